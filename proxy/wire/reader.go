package wire

import "encoding/binary"

// reader walks a message without decoding it: it only finds out where things are. After the first error it stays at
// the same place and gives zeros; err says which.
type reader struct {
	b        []byte
	at       int
	flexible bool
	tags     int // unknown tags seen so far
	elements int // of arrays that checkStruct has walked over
	err      error
}

// maxTags bounds the unknown tags of one message, as each becomes a map entry when it is decoded. Unlike Kafka, which
// bounds them by the size of the frame only.
const maxTags = 1024

// maxElements bounds the strings and structs in the arrays of one group request, as they take far more memory than
// bytes on the wire. A frame of 8 MiB full of committed partitions has fewer. Unlike Kafka, which bounds the frame only.
const maxElements = 1 << 19

// maxString is the longest string that Kafka's generated readers accept, compact ones included.
const maxString = 0x7fff

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) remaining() int { return len(r.b) - r.at }

func (r *reader) skip(n int) {
	if r.err != nil {
		return
	}
	if n > r.remaining() {
		r.fail(ErrShort)
		return
	}
	r.at += n
}

func (r *reader) int8() int8 {
	r.skip(1)
	if r.err != nil {
		return 0
	}
	return int8(r.b[r.at-1])
}

func (r *reader) int16() int16 {
	r.skip(2)
	if r.err != nil {
		return 0
	}
	return int16(binary.BigEndian.Uint16(r.b[r.at-2:]))
}

func (r *reader) int32() int32 {
	r.skip(4)
	if r.err != nil {
		return 0
	}
	return int32(binary.BigEndian.Uint32(r.b[r.at-4:]))
}

// uvarint reads an unsigned varint of at most five bytes (ByteUtils.readUnsignedVarint).
func (r *reader) uvarint() uint32 {
	if r.err != nil {
		return 0
	}
	var v uint32
	for i := range 5 {
		if r.remaining() <= i {
			r.fail(ErrShort)
			return 0
		}
		c := r.b[r.at+i]
		if i == 4 && c > 0x0f {
			break
		}
		v |= uint32(c&0x7f) << (7 * i)
		if c < 0x80 {
			r.at += i + 1
			return v
		}
	}
	r.fail(ErrMalformed)
	return 0
}

// stringLen reads the length of a string: -1 for null.
func (r *reader) stringLen() int {
	if !r.flexible {
		return max(int(r.int16()), -1)
	}
	n := int(r.uvarint()) - 1
	if n > maxString {
		r.fail(ErrMalformed)
		return 0
	}
	return n
}

// sizeLen reads the length of bytes or of an array: -1 for null.
func (r *reader) sizeLen() int {
	if !r.flexible {
		return max(int(r.int32()), -1)
	}
	return int(r.uvarint()) - 1
}

// skipLen skips as many bytes as a length says, -1 for null; null is an error unless it is allowed.
func (r *reader) skipLen(n int, null bool) {
	if r.err != nil {
		return
	}
	if n < 0 {
		if !null {
			r.fail(ErrMalformed)
		}
		return
	}
	r.skip(n)
}

func (r *reader) skipString(null bool) { r.skipLen(r.stringLen(), null) }

func (r *reader) skipBytes(null bool) { r.skipLen(r.sizeLen(), null) }

// string gives the bytes of a string, which may be null only if it says so.
func (r *reader) string(null bool) []byte {
	n := r.stringLen()
	r.skipLen(n, null)
	if r.err != nil || n < 0 {
		return nil
	}
	return r.b[r.at-n : r.at]
}

// arrayLen reads the length of an array: 0 for null, which is an error unless it is allowed. Each element takes a
// byte at least, so a longer array cannot be whole: Kafka refuses it before it makes room for it, and so do we.
func (r *reader) arrayLen(null bool) int {
	n := r.sizeLen()
	switch {
	case r.err != nil:
		return 0
	case n < 0:
		if !null {
			r.fail(ErrMalformed)
		}
		return 0
	case n > r.remaining():
		r.fail(ErrShort)
		return 0
	}
	return n
}

// count counts the elements of an array before they are walked over.
func (r *reader) count(n int) int {
	if r.elements += n; r.elements > maxElements {
		r.fail(ErrMalformed)
	}
	return n
}

// skipTags skips the tagged fields that end each struct of a flexible version.
func (r *reader) skipTags() {
	if !r.flexible {
		return
	}
	for n := r.uvarint(); n > 0 && r.err == nil; n-- {
		if r.tags++; r.tags > maxTags {
			r.fail(ErrMalformed)
			return
		}
		r.uvarint()
		r.skipLen(int(r.uvarint()), false)
	}
}
