package replicate

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// authority signs certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "an authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t: t, cert: cert, key: key}
}

// issue writes the files of a node of the given DNS names into dir.
func (a *authority) issue(dir string, change func(*x509.Certificate), names ...string) Security {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: names, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	s := Security{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"), CAFile: filepath.Join(dir, "ca.pem")}
	for name, block := range map[string]*pem.Block{
		s.CertFile: {Type: "CERTIFICATE", Bytes: der}, s.KeyFile: {Type: "PRIVATE KEY", Bytes: pkcs8}, s.CAFile: {Type: "CERTIFICATE", Bytes: a.cert.Raw},
	} {
		// As a mounted secret is changed: another file under the same name.
		if err := os.WriteFile(name+".new", pem.EncodeToMemory(block), 0o600); err != nil {
			a.t.Fatal(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			a.t.Fatal(err)
		}
	}
	return s
}

func secured(s Security) func(*peerConfig, *peerIdentity) {
	return func(c *peerConfig, _ *peerIdentity) { c.security = s }
}

// meet dials b from a and sends something both ways.
func meet(t *testing.T, a, b *testPeer) {
	t.Helper()
	conn, who, err := a.dial(context.Background(), b.id.node, peerForward)
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, a.log, b.log)
	}
	defer conn.Close()
	if who != b.id {
		t.Errorf("reached %+v", who)
	}
	taken := b.take()
	if taken.from != a.id {
		t.Errorf("dialled by %+v", taken.from)
	}
	exchange(t, conn, taken.conn)
}

func TestPeersWithCertificatesMeet(t *testing.T) {
	ca, d := newAuthority(t), &directory{}
	a := openTestPeer(t, d, secured(ca.issue(t.TempDir(), nil, "node.orders")))
	withToken := ca.issue(t.TempDir(), nil, "other.example", "NODE.Orders") // DNS knows no case
	b := openTestPeer(t, d, secured(withToken))
	meet(t, a, b)
	meet(t, b, a)
	if a.refuses(b.id.node) {
		t.Error("it refuses")
	}
	_ = b.close()
	if !a.refuses(b.id.node) {
		t.Error("it is gone")
	}
	if a.log.String() != "" || b.log.String() != "" {
		t.Errorf("log: %s%s", a.log, b.log)
	}
}

// A certificate says which cluster one belongs to, and the authority that it says so rightly. Both sides look.
func TestWithoutTheRightCertificateNothingIsExchanged(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	past := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	for _, test := range []struct {
		name     string
		cluster  string // of the one that does not belong
		security Security
	}{
		{"of another authority", "orders", other.issue(t.TempDir(), nil, "node.orders")},
		{"of another cluster", "payments", ca.issue(t.TempDir(), nil, "node.payments")},
		{"expired", "orders", ca.issue(t.TempDir(), past, "node.orders")},
		{"none", "orders", Security{}},
		{"none, but a token", "orders", Security{Token: "secret"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := &directory{}
			odd := openTestPeer(t, d, func(c *peerConfig, id *peerIdentity) { c.security, id.cluster = test.security, test.cluster })
			p := openTestPeer(t, d, secured(ca.issue(t.TempDir(), nil, "node.orders")))
			if _, _, err := odd.dial(context.Background(), p.id.node, peerForward); err == nil || strings.Contains(err.Error(), "orders") {
				t.Errorf("dialling it: %v", err)
			}
			waitFor(t, "counted", func() bool { return p.metrics.Strangers(tracing.StrangerTLS) == 1 })
			waitFor(t, "logged", func() bool { return strings.Contains(p.log.String(), "--peer-cert") })
			if _, _, err := p.dial(context.Background(), odd.id.node, peerForward); err == nil {
				t.Error("dialled from it")
			}
			if len(p.taken)+len(odd.taken) != 0 {
				t.Error("a connection was taken")
			}
			if test.name == "expired" && !strings.Contains(odd.log.String(), "peers will refuse the certificate") {
				t.Errorf("it was not told:\n%s", odd.log)
			}
		})
	}
}

// TLS clients of all sorts: they see our certificate, as TLS will have it, and not a byte more.
func TestATLSStrangerGetsNothing(t *testing.T) {
	ca := newAuthority(t)
	p := openTestPeer(t, &directory{}, secured(ca.issue(t.TempDir(), nil, "node.orders")))
	wildcard := ca.issue(t.TempDir(), nil, "*.orders")
	pair, err := tls.LoadX509KeyPair(wildcard.CertFile, wildcard.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []*tls.Config{
		{},
		{Certificates: []tls.Certificate{pair}},
		{MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}},
	} {
		c.InsecureSkipVerify = true
		conn, err := tls.Dial("tcp", p.addr().String(), c)
		if err == nil {
			var b []byte
			b, err = io.ReadAll(conn)
			if len(b) != 0 {
				t.Errorf("got %q", b)
			}
			_ = conn.Close()
		}
		if err == nil {
			t.Errorf("%d: no error", i)
		}
		waitFor(t, "counted", func() bool { return p.metrics.Strangers(tracing.StrangerTLS) == int64(i+1) })
	}
	if got := talk(t, p, []byte("OSP1\x00\x02\x01\x01")); len(got) > 16 { // at most an alert
		t.Errorf("got %q", got)
	}
}

// Certificates live for hours where a machine issues them: new files count from the next connection on, half-written
// ones do not.
func TestCertificatesAreReadAgainWhenTheyChange(t *testing.T) {
	old, dirs, d := newAuthority(t), [2]string{t.TempDir(), t.TempDir()}, &directory{}
	a := openTestPeer(t, d, secured(old.issue(dirs[0], nil, "node.orders")))
	b := openTestPeer(t, d, secured(old.issue(dirs[1], nil, "node.orders")))
	meet(t, a, b)
	next := newAuthority(t)
	next.issue(dirs[0], nil, "node.orders")
	if _, _, err := a.dial(context.Background(), b.id.node, peerForward); err == nil {
		t.Error("one with new files only and one with old files only get on")
	}
	files := next.issue(dirs[1], nil, "node.orders")
	meet(t, a, b)
	meet(t, b, a)
	whole, err := os.ReadFile(files.CertFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, broken := range [][]byte{whole[:len(whole)/2], nil} {
		if err := os.WriteFile(files.CertFile, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		meet(t, a, b)
	}
	if err := os.Remove(files.CertFile); err != nil {
		t.Fatal(err)
	}
	meet(t, a, b)
	if n := strings.Count(b.log.String(), "going on with the certificate as it was"); n != 1 {
		t.Errorf("told %d times:\n%s", n, b.log)
	}
	next.issue(dirs[1], nil, "node.orders")
	meet(t, a, b)
}

func TestSecurityIsValidatedInTermsOfItsFlags(t *testing.T) {
	ca := newAuthority(t)
	good := ca.issue(t.TempDir(), nil, "node.orders")
	noise := filepath.Join(t.TempDir(), "noise")
	if err := os.WriteFile(noise, []byte("noise"), 0o600); err != nil {
		t.Fatal(err)
	}
	stranger := ca.issue(t.TempDir(), nil, "node.orders")
	for _, test := range []struct {
		s    Security
		want string // "" is none
	}{
		{Security{}, ""},
		{Security{Insecure: true}, ""},
		{Security{Token: "t"}, ""},
		{good, ""},
		{Security{Keyring: [][]byte{make([]byte, 16), make([]byte, 24), make([]byte, 32)}}, ""},
		{Security{Keyring: [][]byte{make([]byte, 16), make([]byte, 20)}}, "--gossip-key-file: key 2 has 20 bytes"},
		{Security{CertFile: good.CertFile, KeyFile: good.KeyFile}, "--peer-ca is missing"},
		{Security{CAFile: good.CAFile}, "--peer-cert is missing"},
		{Security{CertFile: good.CertFile, CAFile: good.CAFile}, "--peer-key is missing"},
		{Security{CertFile: "/nowhere/cert", KeyFile: good.KeyFile, CAFile: good.CAFile}, "--peer-cert: open /nowhere/cert"},
		{Security{CertFile: good.CertFile, KeyFile: stranger.KeyFile, CAFile: good.CAFile}, "--peer-key"},
		{Security{CertFile: noise, KeyFile: good.KeyFile, CAFile: good.CAFile}, "--peer-cert"},
		{Security{CertFile: good.CertFile, KeyFile: good.KeyFile, CAFile: noise}, "--peer-ca"},
	} {
		if err := test.s.Validate(); (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, not %q", test.s, err, test.want)
		}
	}
	c := peerConfig{bind: "127.0.0.1:0", security: ca.issue(t.TempDir(), nil, "orders")}
	c.identity = func() peerIdentity { return peerIdentity{cluster: "orders", node: uuid.NewString()} }
	if _, err := openPeerPort(c); err == nil || !strings.Contains(err.Error(), "--peer-cert") || !strings.Contains(err.Error(), "node.orders") {
		t.Errorf("%v", err)
	}
}

// The join token gives gossip its key as well: another one than that of the peer port, and the same everywhere.
func TestTheJoinTokenKeysGossip(t *testing.T) {
	key := gossipKey("correct horse")
	if got := fmt.Sprintf("%x", key); got != "e3bc38aab69c85e7722da985ff2b2e5aae1a29dcdd92d2e8a027b9f4e6772eac" {
		t.Error(got)
	}
	if bytes.Equal(key, derive("correct horse", peerPurpose)) || bytes.Equal(key, gossipKey("correct horsf")) {
		t.Error("keys are shared")
	}
}

func TestPeersWithTheSameJoinTokenMeet(t *testing.T) {
	ca, d := newAuthority(t), &directory{}
	a, b := openTestPeer(t, d, secured(Security{Token: "correct horse"})), openTestPeer(t, d, secured(Security{Token: "correct horse"}))
	meet(t, a, b)
	meet(t, b, a)
	if a.refuses(b.id.node) {
		t.Error("it refuses")
	}
	both := ca.issue(t.TempDir(), nil, "node.orders")
	both.Token = "correct horse"
	c, e := openTestPeer(t, d, secured(both)), openTestPeer(t, d, secured(both))
	meet(t, c, e)
	// Who has proved itself is told what is wrong.
	odd := openTestPeer(t, d, func(c *peerConfig, id *peerIdentity) { c.security, id.cluster = a.config.security, "payments" })
	_, _, err := odd.dial(context.Background(), b.id.node, peerForward)
	var refused *refusal
	if !errors.As(err, &refused) || refused.code != codeOtherCluster {
		t.Errorf("%v", err)
	}
	b.refusedFor(tracing.StrangerCluster, "payments")
}

// Without the token one is told nothing: no version, no name, not what was wrong.
func TestWithoutTheJoinTokenNothingIsExchanged(t *testing.T) {
	for name, token := range map[string]string{"another token": "correct horsf", "no token": ""} {
		t.Run(name, func(t *testing.T) {
			d := &directory{}
			odd, p := openTestPeer(t, d, secured(Security{Token: token})), openTestPeer(t, d, secured(Security{Token: "correct horse"}))
			for _, pair := range [][2]*testPeer{{odd, p}, {p, odd}} {
				_, _, err := pair[0].dial(context.Background(), pair[1].id.node, peerForward)
				if err == nil || strings.Contains(err.Error(), "orders") {
					t.Errorf("%v", err)
				}
				pair[1].refusedFor(tracing.StrangerToken, "--join-token", "127.0.0.1")
			}
			if len(p.taken)+len(odd.taken) != 0 {
				t.Error("a connection was taken")
			}
		})
	}
	p := openTestPeer(t, &directory{}, secured(Security{Token: "correct horse"}))
	h, err := hello{kind: peerForward, version: 1, from: p.id}.encode()
	if err != nil {
		t.Fatal(err)
	}
	opening := append([]byte(tokenMagic), make([]byte, 32)...)
	for say, bytes := range map[string]int{
		string(h): 0, "GET / HTTP/1.1\r\n\r\n": 0,
		string(opening) + string(h) + strings.Repeat("p", 32):       32, // noise, to prove the token with
		string(opening) + string(opening) + strings.Repeat("p", 99): 32,
	} {
		if got := talk(t, p, []byte(say)); len(got) != bytes {
			t.Errorf("%q got %q", say, got)
		}
	}
	if len(p.taken) != 0 {
		t.Error("a connection was taken")
	}
}

// Whoever answers has to know the token too; what the other side has just said does not help.
func TestAnAnswerMustProveTheJoinToken(t *testing.T) {
	for _, reflect := range []bool{false, true} {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		d := &directory{}
		p := openTestPeer(t, d, secured(Security{Token: "correct horse"}))
		node := uuid.New()
		d.set(node.String(), listener.Addr().String())
		impostor := make(chan error, 1)
		go func() {
			conn, err := listener.Accept()
			if err != nil {
				impostor <- err
				return
			}
			defer conn.Close()
			_, _ = io.ReadFull(conn, make([]byte, 36))
			_, _ = conn.Write(make([]byte, 32))
			_, _ = io.ReadFull(conn, make([]byte, 4))
			_, _ = readSealed(conn)
			proof := make([]byte, 32)
			_, err = io.ReadFull(conn, proof)
			if !reflect {
				clear(proof)
			}
			a, _ := answer{version: 1, node: node, clusterID: clusterB}.encode()
			_, _ = conn.Write(append(a, proof...))
			impostor <- err
		}()
		if _, _, err := p.dial(context.Background(), node.String(), peerForward); err == nil || !strings.Contains(err.Error(), "does not know the join token") {
			t.Errorf("%v", err)
		}
		if err := <-impostor; err != nil {
			t.Error(err)
		}
	}
}

// recorder keeps what is written to a connection.
type recorder struct {
	net.Conn
	said *bytes.Buffer
}

func (r recorder) Write(b []byte) (int, error) { r.said.Write(b); return r.Conn.Write(b) }

// What was overheard does not open the port a second time.
func TestAJoinTokenCannotBeReplayed(t *testing.T) {
	d, said := &directory{}, new(bytes.Buffer)
	p := openTestPeer(t, d, secured(Security{Token: "correct horse"}))
	a := openTestPeer(t, d, func(c *peerConfig, _ *peerIdentity) {
		c.security = p.config.security
		c.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			return recorder{conn, said}, err
		}
	})
	conn, _, err := a.dial(context.Background(), p.id.node, peerForward)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	_ = p.take().conn.Close()
	if got := talk(t, p, said.Bytes()); len(got) != 32 {
		t.Errorf("%d bytes", len(got))
	}
	p.refusedFor(tracing.StrangerToken)
}

// Where nothing tells a stranger from a peer, only this machine's sidecars are peers.
func TestWithoutSecurityOnlyLoopbackPeersAreAccepted(t *testing.T) {
	for _, security := range []Security{{}, {Insecure: true}, {Token: "correct horse"}} {
		synctest.Test(t, func(t *testing.T) {
			network, d := &pipes{from: "192.0.2.1:999"}, &directory{}
			a := openTestPeer(t, d, func(c *peerConfig, id *peerIdentity) { network.on("127.0.0.1:7947")(c, id); c.security = security })
			b := openTestPeer(t, d, func(c *peerConfig, id *peerIdentity) { network.on("192.0.2.2:7947")(c, id); c.security = security })
			open := !security.strangersPossible()
			for _, node := range []string{a.id.node, b.id.node} {
				conn, _, err := b.dial(t.Context(), node, peerForward)
				if (err == nil) != open {
					t.Errorf("%+v: %v", security, err)
				}
				if err == nil {
					_ = conn.Close()
				}
			}
			if open {
				_, _ = a.take().conn.Close(), b.take().conn.Close()
				return
			}
			a.refusedFor(tracing.StrangerAddress, "192.0.2.1", "--join-token", "--peer-cert", "--insecure-peers")
			synctest.Wait()
			if b.metrics.Strangers(tracing.StrangerAddress) != 0 { // it was left alone, and learnt nothing
				t.Error("the other side was spoken to")
			}
			if !strings.Contains(b.log.String(), "--insecure-peers") {
				t.Errorf("log:\n%s", b.log)
			}
		})
	}
}

// A port that nobody listens on any more refuses whatever the security: no hello is needed for that.
func TestRefusalNeedsNoHello(t *testing.T) {
	d := &directory{}
	p := openTestPeer(t, d, secured(Security{Token: "correct horse"}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	node := uuid.NewString()
	d.set(node, listener.Addr().String())
	_ = listener.Close()
	if !p.refuses(node) {
		t.Error("it does not")
	}
	if _, _, err := p.dial(context.Background(), node, peerRaft); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v", err)
	}
}
