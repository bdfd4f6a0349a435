package wire

import (
	"encoding/binary"
	"fmt"
)

// PeerKind says what a message on a connection for forwarded requests is. Kinds that are not known are skipped.
type PeerKind uint8

// The kinds: docs/formats.md, "Forwarded requests".
const (
	PeerBegin    PeerKind = 1 + iota // the first message of the dialling side
	PeerOpen                         // a session's stream begins
	PeerRequest                      // a client's frame
	PeerClose                        // the client has gone
	PeerResponse                     // back: the answer to a request
	PeerPing                         // asks for a PeerPong
	PeerPong                         // back
)

// PeerCode says what became of a forwarded request.
type PeerCode uint8

// The codes.
const (
	PeerAnswered  PeerCode = iota // Frame is the response
	PeerInactive                  // given back: that activation is not, or no longer, the one that answers
	PeerRefused                   // answered with Error; Frame is a text that says why
	PeerStreamEnd                 // given back: an earlier request of the stream has ended it
)

// PeerMessage is a message of any kind, with the fields of its kind set.
type PeerMessage struct {
	Kind   PeerKind
	Stream uint32 // on this connection, chosen by the dialling side; 0 with PeerBegin, PeerPing and PeerPong

	Process [16]byte // PeerBegin: of the dialling side, a UUID for each run of it
	Number  uint64   // PeerBegin: of the connection, in that process; PeerOpen: of the stream, in its session

	Term      uint64   // PeerOpen: the activation meant; PeerResponse: the answering side's current one
	Session   [16]byte // PeerOpen: of the client connection
	Host      string   // PeerOpen: the client's address, as Kafka shows it
	Principal string   // PeerOpen
	Listener  int32    // PeerOpen: the node id whose listener the client came in by, -1: bootstrap

	Ordinal  uint64 // PeerRequest, PeerResponse: of the request in its session
	Deadline uint32 // PeerRequest: milliseconds left
	Trace    []byte // PeerRequest: W3C traceparent, at most 255 bytes

	Code  PeerCode // PeerResponse
	Error int16    // PeerResponse with PeerRefused: Kafka's error code
	Frame []byte   // PeerRequest, PeerResponse: the frame, or the text
}

// PeerOverhead bounds what a PeerRequest or PeerResponse has besides its frame, and a whole message of any other kind
// but PeerOpen, whose strings may take 64 KiB each.
const PeerOverhead = 512

// Bounds of what is written; what is longer is cut.
const (
	maxPeerString = 1<<16 - 1 // the strings of a PeerOpen
	maxPeerTrace  = 1<<8 - 1
)

// AppendPeer appends a whole message, its length in front.
func AppendPeer(dst []byte, m *PeerMessage) []byte {
	dst, start := BeginPeer(dst, m)
	return EndPeer(append(dst, m.Frame...), start)
}

// BeginPeer appends a message up to its frame. The caller appends the frame and calls EndPeer.
func BeginPeer(dst []byte, m *PeerMessage) (begun []byte, start int) {
	start = len(dst)
	dst = append(dst, 0, 0, 0, 0, byte(m.Kind))
	dst = binary.BigEndian.AppendUint32(dst, m.Stream)
	switch m.Kind {
	case PeerBegin:
		dst = append(dst, m.Process[:]...)
		dst = binary.BigEndian.AppendUint64(dst, m.Number)
	case PeerOpen:
		dst = binary.BigEndian.AppendUint64(dst, m.Term)
		dst = append(dst, m.Session[:]...)
		dst = binary.BigEndian.AppendUint64(dst, m.Number)
		dst = appendPeerString(dst, m.Host)
		dst = appendPeerString(dst, m.Principal)
		dst = binary.BigEndian.AppendUint32(dst, uint32(m.Listener))
	case PeerRequest:
		dst = binary.BigEndian.AppendUint64(dst, m.Ordinal)
		dst = binary.BigEndian.AppendUint32(dst, m.Deadline)
		trace := m.Trace[:min(len(m.Trace), maxPeerTrace)]
		dst = append(dst, byte(len(trace)))
		dst = append(dst, trace...)
	case PeerResponse:
		dst = binary.BigEndian.AppendUint64(dst, m.Ordinal)
		dst = append(dst, byte(m.Code))
		dst = binary.BigEndian.AppendUint64(dst, m.Term)
		if m.Code == PeerRefused {
			dst = binary.BigEndian.AppendUint16(dst, uint16(m.Error))
		}
	}
	return dst, start
}

// EndPeer completes the message that BeginPeer began at start.
func EndPeer(dst []byte, start int) []byte {
	binary.BigEndian.PutUint32(dst[start:], uint32(len(dst)-start-4))
	return dst
}

func appendPeerString(dst []byte, s string) []byte {
	s = s[:min(len(s), maxPeerString)]
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(s)))
	return append(dst, s...)
}

// ParsePeer reads a message without its length. Frame and Trace are parts of it. Of a kind that is not known only Kind
// and Stream are set, without an error.
func ParsePeer(message []byte) (PeerMessage, error) {
	r := reader{b: message}
	m := PeerMessage{Kind: PeerKind(r.int8()), Stream: uint32(r.int32())}
	whole := true // nothing follows the fields
	switch m.Kind {
	case PeerBegin:
		copy(m.Process[:], r.bytes(16))
		m.Number = r.uint64()
	case PeerOpen:
		m.Term = r.uint64()
		copy(m.Session[:], r.bytes(16))
		m.Number = r.uint64()
		m.Host = string(r.bytes(int(uint16(r.int16()))))
		m.Principal = string(r.bytes(int(uint16(r.int16()))))
		m.Listener = r.int32()
	case PeerRequest:
		m.Ordinal = r.uint64()
		m.Deadline = uint32(r.int32())
		m.Trace = r.bytes(int(uint8(r.int8())))
		whole = false
	case PeerResponse:
		m.Ordinal = r.uint64()
		m.Code = PeerCode(r.int8())
		m.Term = r.uint64()
		if m.Code == PeerRefused {
			m.Error = r.int16()
		}
		whole = false
	case PeerClose, PeerPing, PeerPong:
	default:
		return m, r.err
	}
	if r.err != nil {
		return m, fmt.Errorf("message of kind %d: %w", m.Kind, r.err)
	}
	switch {
	case !whole:
		m.Frame = r.b[r.at:]
	case r.remaining() > 0:
		return m, fmt.Errorf("message of kind %d: %w: %d bytes too many", m.Kind, ErrMalformed, r.remaining())
	}
	return m, nil
}

// bytes gives the next n bytes.
func (r *reader) bytes(n int) []byte {
	r.skip(n)
	if r.err != nil {
		return nil
	}
	return r.b[r.at-n : r.at]
}

func (r *reader) uint64() uint64 {
	b := r.bytes(8)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}
