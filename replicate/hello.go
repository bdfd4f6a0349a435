package replicate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
)

// A connection between peers begins with a hello and its answer (docs/formats.md, "Peer preface and status").
const (
	helloMagic   = "OSP1"
	helloVersion = 1
	maxHello     = 1024 // bytes of a hello or an answer, without magic and length
)

// peerKind is what a connection between peers is for.
type peerKind uint8

const (
	peerRaft    peerKind = 1
	peerForward peerKind = 2
	peerStatus  peerKind = 3
	// peerProbe ends with the answer: it asks who lives there.
	peerProbe peerKind = 4
)

func (k peerKind) String() string {
	switch k {
	case peerRaft:
		return "raft"
	case peerForward:
		return "forwarded requests"
	case peerStatus:
		return "status"
	case peerProbe:
		return "probe"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// peerIdentity is who a sidecar is. A zero clusterID is one that is not known yet.
type peerIdentity struct {
	cluster   string
	clusterID [16]byte
	node      string
}

// A helloCode is the answer to a hello.
type helloCode uint8

const (
	codeWelcome        helloCode = 0
	codeOtherCluster   helloCode = 1
	codeOtherClusterID helloCode = 2
	codeVersion        helloCode = 3
	codeRefused        helloCode = 4
	codeOtherNode      helloCode = 5
)

// refusal is an answer other than welcome, as an error of the side that dialled.
type refusal struct {
	code    helloCode
	message string
}

func (r *refusal) Error() string { return "refused: " + r.message }

// hello is what the dialling side says first.
type hello struct {
	kind    peerKind
	version uint8
	from    peerIdentity
	to      uuid.UUID // the node it wants to reach
}

// answer is what it is told. Who answers is told only to one that knows the cluster's name.
type answer struct {
	version   uint8
	code      helloCode
	message   string
	clusterID [16]byte
	node      uuid.UUID
}

var errHello = errors.New("not a hello")

func (h hello) encode() ([]byte, error) {
	node, err := uuid.Parse(h.from.node)
	if err != nil {
		return nil, fmt.Errorf("own node id %q: %w", h.from.node, err)
	}
	b := append([]byte(helloMagic), 0, 0, h.version, byte(h.kind))
	b = appendString(b, h.from.cluster)
	b = append(b, h.from.clusterID[:]...)
	b = append(b, node[:]...)
	b = append(b, h.to[:]...)
	return sealLength(b, len(helloMagic))
}

// decodeHello reads the body of a hello of any version: later ones may only add to it.
func decodeHello(b []byte) (hello, error) {
	if len(b) < 2 {
		return hello{}, errHello
	}
	h := hello{version: b[0], kind: peerKind(b[1])}
	var ok bool
	var node uuid.UUID
	if h.from.cluster, b, ok = cutString(b[2:]); !ok || len(b) < 48 {
		return hello{}, errHello
	}
	copy(h.from.clusterID[:], b)
	copy(node[:], b[16:])
	copy(h.to[:], b[32:])
	h.from.node = node.String()
	return h, nil
}

func (a answer) encode() ([]byte, error) {
	b := append([]byte{0, 0, a.version, byte(a.code)}, a.clusterID[:]...)
	b = append(b, a.node[:]...)
	return sealLength(appendString(b, a.message), 0)
}

func decodeAnswer(b []byte) (answer, error) {
	if len(b) < 34 {
		return answer{}, errHello
	}
	a := answer{version: b[0], code: helloCode(b[1])}
	copy(a.clusterID[:], b[2:])
	copy(a.node[:], b[18:])
	var ok bool
	if a.message, _, ok = cutString(b[34:]); !ok {
		return answer{}, errHello
	}
	return a, nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 2 {
		return "", nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if b = b[2:]; n > len(b) {
		return "", nil, false
	}
	return string(b[:n]), b[n:], true
}

// sealLength writes at b[at:] how many bytes follow the two that it takes.
func sealLength(b []byte, at int) ([]byte, error) {
	n := len(b) - at - 2
	if n > maxHello {
		return nil, fmt.Errorf("a hello of %d bytes, more than %d", n, maxHello)
	}
	binary.BigEndian.PutUint16(b[at:], uint16(n))
	return b, nil
}

// readSealed reads a length and what follows, not a byte more; whole is both.
func readSealed(r io.Reader) (whole []byte, err error) {
	length := make([]byte, 2, 256)
	if _, err := io.ReadFull(r, length); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length))
	if n > maxHello {
		return nil, errHello
	}
	whole = append(length, make([]byte, n)...)
	if _, err := io.ReadFull(r, whole[2:]); err != nil {
		return nil, err
	}
	return whole, nil
}

// meet compares a hello with ourselves, in the order in which a stranger may learn of us. The code is welcome or what is
// wrong, in words for the side that dialled; they never name our cluster.
func (h hello) meet(own peerIdentity) (helloCode, string) {
	switch {
	case h.from.cluster != own.cluster:
		return codeOtherCluster, "another cluster lives here: compare --cluster, and where --join leads, on both sides"
	case h.version < helloVersion:
		return codeVersion, fmt.Sprintf("peer protocol %d is not spoken here, only %d: upgrade the older sidecar", h.version, helloVersion)
	case h.from.clusterID != own.clusterID && h.from.clusterID != [16]byte{} && own.clusterID != [16]byte{}:
		return codeOtherClusterID, "a cluster of the same name but another origin lives here: two were founded. Stop the sidecars of one, empty their data directories and let them join the other"
	case h.to != uuid.Nil && h.to.String() != own.node:
		return codeOtherNode, "another node lives here"
	}
	return codeWelcome, ""
}
