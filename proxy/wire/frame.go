package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/twmb/franz-go/pkg/kmsg"
)

var (
	// ErrShort says that the bytes end before what was asked for. With a prefix of a frame: read more. With all of it:
	// the frame is broken.
	ErrShort = errors.New("frame ends too early")
	// ErrMalformed says that Kafka's schema does not allow these bytes, whatever comes after them.
	ErrMalformed = errors.New("malformed frame")
	// ErrVersion says that the message is of an api key or version that this package does not know.
	ErrVersion = errors.New("unknown api key or version")
	// ErrUnknownNode says that a reply names a node for which there is no address of ours.
	ErrUnknownNode = errors.New("unknown node id")
)

const keyApiVersions = 18

// AppendResponse appends a whole frame, its size in front, that answers the request with that correlation id. The
// response's own version decides on its encoding and on its header: tags follow the correlation id in flexible
// versions, but never in ApiVersions, which clients read before they know what the broker speaks (KIP-511).
func AppendResponse(dst []byte, correlationID int32, resp kmsg.Response) []byte {
	start := len(dst)
	dst = AppendResponseFrame(append(dst, 0, 0, 0, 0), correlationID, resp)
	binary.BigEndian.PutUint32(dst[start:], uint32(len(dst)-start-4))
	return dst
}

// AppendResponseFrame appends what AppendResponse does, without the size in front.
func AppendResponseFrame(dst []byte, correlationID int32, resp kmsg.Response) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(correlationID))
	if resp.IsFlexible() && resp.Key() != keyApiVersions {
		dst = append(dst, 0)
	}
	return resp.AppendTo(dst)
}

// DecodeResponse decodes a frame that answers a request of that key and version, as AppendResponseFrame writes it.
func DecodeResponse(key, version int16, frame []byte) (kmsg.Response, error) {
	resp := kmsg.ResponseForKey(key)
	if resp == nil {
		return nil, fmt.Errorf("%w: api key %d", ErrVersion, key)
	}
	resp.SetVersion(version)
	r := reader{b: frame, flexible: resp.IsFlexible() && key != keyApiVersions}
	r.skip(4)
	r.skipTags()
	if r.err != nil {
		return nil, r.err
	}
	if err := resp.ReadFrom(frame[r.at:]); err != nil {
		return nil, fmt.Errorf("%s version %d: %w", kmsg.NameForKey(key), version, ErrShort)
	}
	return resp, nil
}

// otherProtocols are the first bytes of what people point at a Kafka port by mistake.
var otherProtocols = []struct{ first, name string }{
	{"\x16\x03", "TLS"},       // a handshake record
	{"\x15\x03", "TLS alert"}, // what a TLS port says to a plain client
	{"GET ", "HTTP GET"},
	{"HEAD", "HTTP HEAD"},
	{"POST", "HTTP POST"},
	{"PUT ", "HTTP PUT"},
	{"PATC", "HTTP PATCH"},
	{"DELE", "HTTP DELETE"},
	{"OPTI", "HTTP OPTIONS"},
	{"CONN", "HTTP CONNECT"},
	{"TRAC", "HTTP TRACE"},
	{"PRI ", "HTTP/2"},
	{"HTTP", "HTTP response"},
	{"SSH-", "SSH"},
}

// Sniff names the protocol that a connection's first four bytes belong to when it is not Kafka's: "TLS", "HTTP GET";
// else it gives "". Read as the size of a Kafka frame these bytes would announce 336 MB and more, which is how such a
// mistake ends in an OutOfMemoryError elsewhere (apache/kafka#5940).
func Sniff(first []byte) string {
	for _, p := range otherProtocols {
		if bytes.HasPrefix(first, []byte(p.first)) {
			return p.name
		}
	}
	return ""
}
