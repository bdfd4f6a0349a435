package replicate

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// tokenMagic begins a connection on which both sides prove that they know the join token.
const tokenMagic = "OSPT"

// Validate says what is wrong with s, in terms of the flags that set it.
func (s Security) Validate() error {
	for i, key := range s.Keyring {
		if n := len(key); n != 16 && n != 24 && n != 32 {
			return fmt.Errorf("--gossip-key-file: key %d has %d bytes; AES takes 16, 24 or 32 (in base64: 24, 32 or 44 characters)", i+1, n)
		}
	}
	files := s.files()
	for i, flag := range securityFlags {
		if files[i] == "" && s.tls() {
			return fmt.Errorf("%s is missing: --peer-cert, --peer-key and --peer-ca go together", flag)
		}
	}
	if !s.tls() {
		return nil
	}
	_, err := loadCredentials(files)
	return err
}

var securityFlags = [3]string{"--peer-cert", "--peer-key", "--peer-ca"}

func (s Security) files() [3]string { return [3]string{s.CertFile, s.KeyFile, s.CAFile} }

func (s Security) tls() bool { return s.files() != [3]string{} }

// strangersPossible says that nothing would tell a peer from a stranger but the address it comes from.
func (s Security) strangersPossible() bool { return !s.tls() && s.Token == "" && !s.Insecure }

// gossipKey derives the key that gossip is encrypted with where no keyring is given.
func gossipKey(token string) []byte { return derive(token, gossipPurpose) }

// What keys derived from the token are for.
const (
	gossipPurpose = "offset-sidecar gossip 1"
	peerPurpose   = "offset-sidecar peer 1"
)

func derive(token, purpose string) []byte {
	key, err := hkdf.Key(sha256.New, []byte(token), nil, purpose, 32)
	if err != nil {
		panic(err) // only for a length that SHA-256 cannot give
	}
	return key
}

// A stranger is why an incoming connection is closed: kind is counted, text is logged and says what to do.
type stranger struct {
	kind tracing.Stranger
	text string
}

func (s *stranger) Error() string { return s.text }

func strange(kind tracing.Stranger, format string, args ...any) error {
	return &stranger{kind: kind, text: fmt.Sprintf(format, args...)}
}

// guard is what both sides of a connection do before, and around, the hello.
type guard struct {
	credentials *credentials // nil: no TLS
	token       []byte       // nil: none
}

func newGuard(s Security, cluster string, complain func(key, text string)) (guard, error) {
	if err := s.Validate(); err != nil {
		return guard{}, err
	}
	g := guard{}
	if s.Token != "" {
		g.token = derive(s.Token, peerPurpose)
	}
	if !s.tls() {
		return g, nil
	}
	g.credentials = &credentials{files: s.files(), complain: complain}
	pair, err := g.credentials.load()
	if err != nil {
		return guard{}, err
	}
	if err := pair.named(pair.cert.Leaf, cluster); err != nil {
		return guard{}, fmt.Errorf("--peer-cert %s: %w", s.CertFile, err)
	}
	if err := pair.verify(pair.chain(), cluster); err != nil {
		// Not fatal: traffic of clients goes on without peers, and the files are read again when they change.
		complain("own certificate", fmt.Sprintf("peers will refuse the certificate of --peer-cert %s, by --peer-ca: %v", s.CertFile, err))
	}
	return g, nil
}

// shieldClient puts TLS round a connection that we have dialled, where it is on.
func (g guard) shieldClient(ctx context.Context, conn net.Conn, cluster string) (net.Conn, error) {
	if g.credentials == nil {
		return conn, nil
	}
	shielded := tls.Client(conn, g.credentials.config(cluster))
	if err := shielded.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return shielded, nil
}

// shieldServer does the same for one that was accepted.
func (g guard) shieldServer(ctx context.Context, conn net.Conn, cluster string) (net.Conn, error) {
	if g.credentials == nil {
		return conn, nil
	}
	shielded := tls.Server(conn, g.credentials.config(cluster))
	err := shielded.HandshakeContext(ctx)
	var record tls.RecordHeaderError
	switch {
	case err == nil:
		return shielded, nil
	case errors.As(err, &record):
		return nil, strange(tracing.StrangerTLS, "it does not speak TLS: if it is a sidecar, give it --peer-cert, --peer-key and --peer-ca as well")
	case isSilence(err):
		return nil, strange(tracing.StrangerSilent, "TLS was not completed: %v", err)
	}
	return nil, strange(tracing.StrangerTLS, "%v: its --peer-cert must be signed by our --peer-ca, and ours by its, for node.%s", err, cluster)
}

// ask sends a hello and gives the body of the answer.
func (g guard) ask(conn net.Conn, hello []byte) ([]byte, error) {
	if g.token == nil {
		if _, err := conn.Write(hello); err != nil {
			return nil, err
		}
		whole, err := readSealed(conn)
		if err != nil {
			return nil, err
		}
		return whole[2:], nil
	}
	nonces := make([]byte, 64) // ours, then theirs
	_, _ = rand.Read(nonces[:32])
	if _, err := conn.Write(append([]byte(tokenMagic), nonces[:32]...)); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(conn, nonces[32:]); err != nil {
		return nil, fmt.Errorf("no join token is taken there: %w", err)
	}
	if _, err := conn.Write(append(slices.Clone(hello), g.proof("dial", nonces, hello)...)); err != nil {
		return nil, err
	}
	whole, err := readSealed(conn)
	if err != nil {
		return nil, fmt.Errorf("the join token is probably not the same there: %w", err)
	}
	proof := make([]byte, sha256.Size)
	if _, err := io.ReadFull(conn, proof); err != nil {
		return nil, err
	}
	if !hmac.Equal(proof, g.proof("answer", nonces, hello, whole)) {
		return nil, errors.New("the one that answered does not know the join token")
	}
	return whole[2:], nil
}

// hear reads a hello, and gives its body and a function that answers it. The side that dialled has to prove first that
// it knows the token: else a stranger would be given something to try tokens on.
func (g guard) hear(conn net.Conn) (body []byte, reply func(answer []byte) error, err error) {
	magic := make([]byte, 4)
	if _, err := io.ReadFull(conn, magic); err != nil {
		return nil, nil, unheard(err)
	}
	nonces := make([]byte, 64)
	switch {
	case string(magic) == helloMagic && g.token == nil:
	case string(magic) == helloMagic:
		return nil, nil, strange(tracing.StrangerToken, "a sidecar without a join token: give it the --join-token of this one")
	case string(magic) == tokenMagic && g.token == nil:
		return nil, nil, strange(tracing.StrangerToken, "a sidecar with a join token, of which this one has none: give both the same --join-token")
	case string(magic) == tokenMagic:
		if _, err := io.ReadFull(conn, nonces[:32]); err != nil {
			return nil, nil, unheard(err)
		}
		_, _ = rand.Read(nonces[32:])
		if _, err := conn.Write(nonces[32:]); err != nil {
			return nil, nil, unheard(err)
		}
		if _, err := io.ReadFull(conn, magic); err != nil {
			return nil, nil, unheard(err)
		}
		if string(magic) != helloMagic {
			return nil, nil, strange(tracing.StrangerGarbage, "it does not go on as a sidecar would")
		}
	case magic[0] == 0x16 && magic[1] == 3: // a TLS handshake
		return nil, nil, strange(tracing.StrangerTLS, "it speaks TLS: if it is a sidecar, give this one --peer-cert, --peer-key and --peer-ca as well")
	default:
		return nil, nil, strange(tracing.StrangerGarbage, "it does not speak as a sidecar does")
	}
	whole, err := readSealed(conn)
	if err != nil {
		return nil, nil, unheard(err)
	}
	if g.token == nil {
		return whole[2:], func(answer []byte) error { _, err := conn.Write(answer); return err }, nil
	}
	hello := append(magic, whole...)
	proof := make([]byte, sha256.Size)
	if _, err := io.ReadFull(conn, proof); err != nil {
		return nil, nil, unheard(err)
	}
	if !hmac.Equal(proof, g.proof("dial", nonces, hello)) {
		return nil, nil, strange(tracing.StrangerToken, "it does not know the join token: if it is a sidecar of this cluster, give it the same --join-token")
	}
	return whole[2:], func(answer []byte) error {
		_, err := conn.Write(append(slices.Clone(answer), g.proof("answer", nonces, hello, answer)...))
		return err
	}, nil
}

// proof is what only somebody who knows the token can say, in one role, about these bytes, once. All parts but the last
// have a length that they tell themselves, or a fixed one.
func (g guard) proof(role string, parts ...[]byte) []byte {
	mac := hmac.New(sha256.New, g.token)
	mac.Write(append([]byte(role), 0))
	for _, part := range parts {
		mac.Write(part)
	}
	return mac.Sum(nil)
}

// unheard says why a hello could not be read.
func unheard(err error) error {
	if isSilence(err) {
		return strange(tracing.StrangerSilent, "it said no complete hello within %v: %v", helloTimeout, err)
	}
	return strange(tracing.StrangerGarbage, "it does not speak as a sidecar does: %v", err)
}

// credentials are a node's certificate and the authorities it believes, as the files say now.
type credentials struct {
	files    [3]string
	complain func(key, text string)

	mu    sync.Mutex
	infos [3]os.FileInfo // of what is loaded, or was tried last
	pair  *keyPair
}

type keyPair struct {
	cert  *tls.Certificate
	roots *x509.CertPool
}

// chain is what the others are shown. X509KeyPair has parsed the first already.
func (p *keyPair) chain() []*x509.Certificate {
	chain := []*x509.Certificate{p.cert.Leaf}
	for _, der := range p.cert.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			chain = append(chain, c)
		}
	}
	return chain
}

// config is for one handshake. Verification is our own: the certificate names the cluster, not a host; and the cluster's
// name is not to be sent in the clear, as a server name is.
func (c *credentials) config(cluster string) *tls.Config {
	pair, err := c.load()
	if err != nil {
		c.complain("certificate files", fmt.Sprintf("going on with the certificate as it was: %v", err))
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{*pair.cert},
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true, // VerifyConnection does it, on both sides
		SessionTicketsDisabled: true, // each connection is verified by what is believed when it is made
		VerifyConnection:       func(s tls.ConnectionState) error { return pair.verify(s.PeerCertificates, cluster) },
	}
}

// load reads the files if they have changed. With an error it still gives what was read before, if anything was.
func (c *credentials) load() (*keyPair, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var infos [3]os.FileInfo
	changed := c.pair == nil
	for i, name := range c.files {
		info, err := os.Stat(name)
		if err != nil {
			return c.pair, fmt.Errorf("%s: %w", securityFlags[i], err)
		}
		infos[i] = info
		old := c.infos[i]
		changed = changed || old == nil || !os.SameFile(old, info) || !old.ModTime().Equal(info.ModTime()) || old.Size() != info.Size()
	}
	if !changed {
		return c.pair, nil
	}
	pair, err := loadCredentials(c.files)
	if err != nil {
		return c.pair, err // a file may be half written: tried again at the next handshake
	}
	c.infos, c.pair = infos, pair
	return pair, nil
}

func loadCredentials(files [3]string) (*keyPair, error) {
	var content [3][]byte
	for i, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", securityFlags[i], err)
		}
		content[i] = b
	}
	cert, err := tls.X509KeyPair(content[0], content[1])
	if err != nil {
		return nil, fmt.Errorf("--peer-cert %s, --peer-key %s: %w", files[0], files[1], err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(content[2]) {
		return nil, fmt.Errorf("--peer-ca %s: holds no certificate in PEM form", files[2])
	}
	return &keyPair{cert: &cert, roots: roots}, nil
}

// verify takes any certificate that the authority has signed for the cluster's nodes, whatever usages it lists: a node
// is both a server and a client.
func (p *keyPair) verify(chain []*x509.Certificate, cluster string) error {
	if len(chain) == 0 {
		return errors.New("no certificate")
	}
	options := x509.VerifyOptions{Roots: p.roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, c := range chain[1:] {
		options.Intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(options); err != nil {
		return err
	}
	return p.named(chain[0], cluster)
}

// named says whether a certificate is for the nodes of the cluster: exactly, no wildcard.
func (p *keyPair) named(leaf *x509.Certificate, cluster string) error {
	want := "node." + cluster
	if !slices.ContainsFunc(leaf.DNSNames, func(name string) bool { return strings.EqualFold(name, want) }) {
		return fmt.Errorf("the certificate is not for the DNS name %s", want)
	}
	return nil
}
