package wire

import (
	"fmt"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// RequestHeader is what every request begins with.
type RequestHeader struct {
	APIKey, APIVersion int16
	CorrelationID      int32
	ClientID           *string // nil when null, and in ControlledShutdown 0, which has none
	// Length counts the header's bytes in the frame. Of an api key that we do not know it counts those up to the client
	// id: whether tags follow, only those who know the key can tell.
	Length int
}

// neverFlexible is the first flexible version of a key that has none.
const neverFlexible = 1<<15 - 1

// firstFlexible has the first version of each known key that has tags (KIP-482).
var firstFlexible = func() (first [kmsg.MaxKey + 1]int16) {
	for key := range first {
		first[key] = neverFlexible
		r := kmsg.RequestForKey(int16(key))
		if r == nil {
			continue
		}
		for v := r.MaxVersion(); v >= 0; v-- {
			if r.SetVersion(v); !r.IsFlexible() {
				break
			}
			first[key] = v
		}
	}
	return first
}()

// flexible says whether requests and responses of that key and version have tags. Versions newer than we know have
// them if the newest that we know has.
func flexible(key, version int16) bool {
	return key >= 0 && int(key) < len(firstFlexible) && version >= firstFlexible[key]
}

// ParseRequestHeader reads the header of a request, of whatever key and version. A prefix of the frame will do;
// ErrShort asks for more of it, any other error means that nobody could read on.
func ParseRequestHeader(frame []byte) (RequestHeader, error) {
	r := reader{b: frame}
	h := RequestHeader{APIKey: r.int16(), APIVersion: r.int16(), CorrelationID: r.int32()}
	if r.err == nil && (h.APIKey < 0 || h.APIVersion < 0 && h.APIKey != int16(kmsg.ApiVersions)) {
		return h, fmt.Errorf("%w: api key %d, version %d", ErrMalformed, h.APIKey, h.APIVersion)
	}
	if h.APIKey == 7 && h.APIVersion == 0 { // ControlledShutdown 0: header version 0
		h.Length = r.at
		return h, r.err
	}
	// A client id is an old-style string in header version 2, too, since ApiVersions is sent before versions are known.
	n := r.stringLen()
	r.skipLen(n, true)
	if r.err == nil && n >= 0 {
		id := string(r.b[r.at-n : r.at])
		h.ClientID = &id
	}
	r.flexible = flexible(h.APIKey, h.APIVersion)
	r.skipTags()
	h.Length = r.at
	return h, r.err
}

// ProduceAcks reads the acks of a Produce request, and the milliseconds it lets the broker wait for them, from the
// beginning of its body. With acks 0 there is no reply.
func ProduceAcks(version int16, body []byte) (acks int16, timeout int32, err error) {
	r := reader{b: body, flexible: flexible(0, version)}
	if version >= 3 {
		r.skipString(true) // the transactional id
	}
	acks = r.int16()
	timeout = r.int32()
	return acks, timeout, r.err
}

// maxOther bounds the requests that are decoded although they do not end here.
const maxOther = 256 << 10

// DecodeRequest decodes the body of a request; h is what ParseRequestHeader gave for this same frame. It is walked over
// first, as strictly as Kafka reads it: [kmsg] reads null arrays and bytes as empty ones, and where tags are claimed that
// are not there it counts them all, four thousand million for five bytes. So a version with tags whose schema we do not
// have is ErrVersion. Byte slices in the request are parts of the frame, strings are not: the frame must not be written
// to again, and who keeps such a slice for long should copy it. Bytes after the last field are ignored, as Kafka does.
// Of requests that are not a group's, no more than 256 KiB are decoded.
func DecodeRequest(h RequestHeader, frame []byte) (kmsg.Request, error) {
	req := kmsg.RequestForKey(h.APIKey)
	if req == nil || h.APIVersion > req.MaxVersion() {
		return nil, fmt.Errorf("%w: api key %d, version %d", ErrVersion, h.APIKey, h.APIVersion)
	}
	body := frame[h.Length:]
	layout, ours := groupRequests[h.APIKey]
	if !ours {
		if len(body) > maxOther {
			return nil, fmt.Errorf("%s version %d: %d bytes, more than the %d that are decoded", kmsg.NameForKey(h.APIKey), h.APIVersion, len(body), maxOther)
		}
		layout = otherRequests[h.APIKey]
	}
	r := reader{b: body, flexible: flexible(h.APIKey, h.APIVersion)}
	switch {
	case layout != nil:
		r.checkStruct(layout, h.APIVersion)
		if r.err != nil {
			return nil, fmt.Errorf("%s version %d: %w at byte %d of %d", kmsg.NameForKey(h.APIKey), h.APIVersion, r.err, h.Length+r.at, len(frame))
		}
		body = body[:r.at]
	case r.flexible:
		return nil, fmt.Errorf("%w: api key %d, version %d", ErrVersion, h.APIKey, h.APIVersion)
	}
	req.SetVersion(h.APIVersion)
	if err := req.ReadFrom(body); err != nil {
		return nil, fmt.Errorf("%s version %d: %w", kmsg.NameForKey(h.APIKey), h.APIVersion, ErrShort)
	}
	return req, nil
}
