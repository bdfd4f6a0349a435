package wire

import (
	"encoding/binary"
	"fmt"
)

// Advertise gives the address under which clients reach a broker through us; not ok if there is none.
type Advertise func(nodeID int32) (host string, port int32, ok bool)

// Endpoint is a broker as a reply of the upstream names it.
type Endpoint struct {
	ID   int32
	Host string
	Port int32
	Rack *string // nil where there is none, or where the reply has no such field
}

// place is where a reply names a broker: an id, then host and port, in a row in all replies that do.
type place struct {
	id       int32
	at, end  int // host and port, the host's length included
	host     []byte
	port     int32
	rack     []byte // nil for none
	flexible bool
}

// addresses is what there is to change in a reply.
type addresses struct {
	places []place
	// In Produce the places lie in a tag whose size changes with them: its bytes in the frame, and where the tag ends.
	sizeAt, sizeEnd, tagEnd int
}

// MaxRewritten gives the newest version of the responses of an api key that RewriteResponse knows; known is false
// for keys whose replies it does not rewrite.
func MaxRewritten(key int16) (version int16, known bool) {
	switch key {
	case 0, 3:
		return 13, true
	case 10:
		return 6, true
	case 60:
		return 2, true
	}
	return 0, false
}

// RewriteResponse replaces each broker's address in a reply by ours. The frame begins with the response header; it is
// not changed, and is itself returned when it names no broker. On any error the reply must not be sent.
func RewriteResponse(key, version int16, frame []byte, adv Advertise) ([]byte, error) {
	var found addresses
	if err := found.find(key, version, frame); err != nil {
		return nil, fmt.Errorf("rewriting response of api key %d, version %d: %w", key, version, err)
	}
	if len(found.places) == 0 {
		return frame, nil
	}
	out := make([]byte, 0, len(frame)+32*len(found.places))
	done := found.sizeEnd // what comes before is put in front at the end
	for i := range found.places {
		p := &found.places[i]
		host, port, ok := adv(p.id)
		if !ok {
			return nil, fmt.Errorf("rewriting response of api key %d, version %d: %w %d", key, version, ErrUnknownNode, p.id)
		}
		out = append(out, frame[done:p.at]...)
		if p.flexible {
			out = binary.AppendUvarint(out, uint64(len(host))+1)
		} else {
			out = binary.BigEndian.AppendUint16(out, uint16(len(host)))
		}
		out = append(out, host...)
		out = binary.BigEndian.AppendUint32(out, uint32(port))
		done = p.end
	}
	if found.sizeEnd == 0 {
		return append(out, frame[done:]...), nil
	}
	out = append(out, frame[done:found.tagEnd]...)
	whole := append(make([]byte, 0, len(frame)+len(out)), frame[:found.sizeAt]...)
	whole = binary.AppendUvarint(whole, uint64(len(out)))
	whole = append(whole, out...)
	return append(whole, frame[found.tagEnd:]...), nil
}

// Endpoints lists the brokers that a reply names, as the upstream sees them, of the same keys and versions as
// [RewriteResponse]: listeners for them can be opened before the reply is sent.
func Endpoints(key, version int16, frame []byte) ([]Endpoint, error) {
	var found addresses
	if err := found.find(key, version, frame); err != nil {
		return nil, fmt.Errorf("reading response of api key %d, version %d: %w", key, version, err)
	}
	var all []Endpoint
	for _, p := range found.places {
		e := Endpoint{ID: p.id, Host: string(p.host), Port: p.port}
		if p.rack != nil {
			rack := string(p.rack)
			e.Rack = &rack
		}
		all = append(all, e)
	}
	return all, nil
}

func (a *addresses) find(key, version int16, frame []byte) error {
	newest, known := MaxRewritten(key)
	if !known || version < 0 || version > newest {
		return ErrVersion
	}
	r := &reader{b: frame, flexible: flexible(key, version)}
	r.int32() // the correlation id
	r.skipTags()
	switch key {
	case 0:
		if version >= 9 { // KIP-951 has them from 10 on, but kmsg reads and writes the tag in 9 as well
			a.findProduce(r, version)
		}
	case 3:
		a.findMetadata(r, version)
	case 10:
		a.findCoordinators(r, version)
	case 60:
		a.findCluster(r, version)
	}
	return r.err
}

// place reads id, host and port, and a rack if there is one. An empty host names no broker: that is how a coordinator
// is given that cannot be found.
func (a *addresses) place(r *reader, rack bool) {
	p := place{id: r.int32(), at: r.at, flexible: r.flexible}
	p.host = r.string(false)
	p.port = r.int32()
	p.end = r.at
	if rack {
		p.rack = r.string(true)
	}
	if r.err == nil && len(p.host) > 0 {
		a.places = append(a.places, p)
	}
}

func (a *addresses) findMetadata(r *reader, version int16) {
	if version >= 3 {
		r.skip(4) // throttle time
	}
	for n := r.arrayLen(false); n > 0 && r.err == nil; n-- {
		a.place(r, version >= 1)
		r.skipTags()
	}
}

func (a *addresses) findCoordinators(r *reader, version int16) {
	if version >= 1 {
		r.skip(4) // throttle time
	}
	if version <= 3 {
		r.skip(2) // error code
		if version >= 1 {
			r.skipString(true)
		}
		a.place(r, false)
		return
	}
	for n := r.arrayLen(false); n > 0 && r.err == nil; n-- {
		r.skipString(false) // the key
		a.place(r, false)
		r.skip(2) // error code
		r.skipString(true)
		r.skipTags()
	}
}

func (a *addresses) findCluster(r *reader, version int16) {
	r.skip(4 + 2) // throttle time, error code
	r.skipString(true)
	endpoints := int8(1)
	if version >= 1 {
		endpoints = r.int8()
	}
	r.skipString(false) // the cluster id
	r.skip(4)           // the controller
	for n := r.arrayLen(false); n > 0 && r.err == nil; n-- {
		if endpoints != 1 {
			// Controllers, which a broker's listener does not name: their ids are no brokers', nor may they leak.
			r.fail(ErrUnknownNode)
			return
		}
		a.place(r, true)
		if version >= 2 {
			r.skip(1) // is fenced
		}
		r.skipTags()
	}
}

// findProduce looks for NodeEndpoints, tag 0 at the very end. Its absence cannot be read off the last byte: that is 0
// as well when the last endpoint ends with no tags of its own.
func (a *addresses) findProduce(r *reader, version int16) {
	for topics := r.arrayLen(false); topics > 0 && r.err == nil; topics-- {
		if version <= 12 {
			r.skipString(false)
		} else {
			r.skip(16)
		}
		for partitions := r.arrayLen(false); partitions > 0 && r.err == nil; partitions-- {
			r.skip(4 + 2 + 8 + 8 + 8) // partition, error code, base offset, append time, log start offset
			for records := r.arrayLen(false); records > 0 && r.err == nil; records-- {
				r.skip(4)
				r.skipString(true)
				r.skipTags()
			}
			r.skipString(true) // error message
			r.skipTags()
		}
		r.skipTags()
	}
	r.skip(4) // throttle time
	for tags := r.uvarint(); tags > 0 && r.err == nil; tags-- {
		tag, sizeAt := r.uvarint(), r.at
		size := int(r.uvarint())
		sizeEnd := r.at
		if tag != 0 {
			r.skip(size)
			continue
		}
		if a.sizeEnd > 0 {
			r.fail(ErrMalformed) // the same tag twice
			return
		}
		a.sizeAt, a.sizeEnd, a.tagEnd = sizeAt, sizeEnd, sizeEnd+size
		for n := r.arrayLen(false); n > 0 && r.err == nil; n-- {
			a.place(r, true)
			r.skipTags()
		}
		if r.err == nil && r.at != a.tagEnd {
			r.fail(ErrMalformed)
		}
	}
}
