package replicate

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
)

// Limits of a status stream.
const (
	maxMessage = 64 << 10 // bytes, without the length
	maxMembers = 64       // of a configuration
)

// What is said on a status stream (docs/formats.md); other kinds are skipped.
const (
	sayActive        = 1
	sayNotActive     = 2
	sayAlive         = 3
	sayAsk           = 4
	sayFacts         = 5
	sayConfiguration = 6
)

// message is one of them; which fields it has depends on its kind.
type message struct {
	kind      uint8
	clusterID [16]byte // of the sender
	node      string   // active: the sender
	term      uint64
	index     uint64
	members   []string
	facts     *facts
}

// append encodes m as said by own.
func (m message) append(b []byte, own peerIdentity) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0, m.kind)
	switch m.kind {
	case sayActive:
		node := uuid.MustParse(own.node) // openPeerPort has looked at it
		b = append(b, own.clusterID[:]...)
		b = binary.BigEndian.AppendUint64(b, m.term)
		b = append(b, node[:]...)
	case sayNotActive:
		b = append(b, own.clusterID[:]...)
		b = binary.BigEndian.AppendUint64(b, m.term)
	case sayAlive:
		b = binary.BigEndian.AppendUint64(b, m.term)
	case sayFacts:
		about, err := json.Marshal(m.facts)
		if err != nil {
			panic(err) // strings and numbers
		}
		b = append(b, about...)
	case sayConfiguration:
		b = append(b, own.clusterID[:]...)
		b = binary.BigEndian.AppendUint64(b, m.term)
		b = binary.BigEndian.AppendUint64(b, m.index)
		b = append(b, byte(len(m.members)))
		for _, member := range m.members {
			id := uuid.MustParse(member) // pushConfiguration and decode have looked at them
			b = append(b, id[:]...)
		}
	}
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	return b
}

var errMessage = errors.New("a status message that cannot be read")

// decodeMessage reads a message without its length. Later versions may add to the end of a body.
func decodeMessage(b []byte) (message, error) {
	if len(b) == 0 {
		return message{}, errMessage
	}
	m := message{kind: b[0]}
	b = b[1:]
	switch m.kind {
	case sayActive, sayNotActive, sayConfiguration:
		if len(b) < 24 {
			return m, errMessage
		}
		copy(m.clusterID[:], b)
		m.term = binary.BigEndian.Uint64(b[16:])
		b = b[24:]
	case sayAlive:
		if len(b) < 8 {
			return m, errMessage
		}
		m.term = binary.BigEndian.Uint64(b)
	case sayFacts:
		m.facts = new(facts)
		if err := json.Unmarshal(b, m.facts); err != nil {
			return m, fmt.Errorf("%w: %w", errMessage, err)
		}
	}
	switch m.kind {
	case sayActive:
		if len(b) < 16 {
			return m, errMessage
		}
		m.node = uuid.UUID(b[:16]).String()
	case sayConfiguration:
		if len(b) < 9 || b[8] > maxMembers || len(b) < 9+16*int(b[8]) {
			return m, errMessage
		}
		m.index = binary.BigEndian.Uint64(b)
		for i := range int(b[8]) {
			m.members = append(m.members, uuid.UUID(b[9+16*i:][:16]).String())
		}
	}
	return m, nil
}

// messageReader reads a status stream.
type messageReader struct{ r *bufio.Reader }

// newMessageReader has a small buffer: there are many streams, and little is said on them.
func newMessageReader(r io.Reader) messageReader { return messageReader{bufio.NewReaderSize(r, 256)} }

func (r messageReader) next() (message, error) {
	var length [4]byte
	if _, err := io.ReadFull(r.r, length[:]); err != nil {
		return message{}, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxMessage {
		return message{}, fmt.Errorf("%w: it has %d bytes, more than %d", errMessage, n, maxMessage)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r.r, b); err != nil {
		return message{}, err
	}
	return decodeMessage(b)
}
