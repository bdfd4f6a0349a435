package proxy

import (
	"io"
	"net"
	"sync"
	"time"

	"github.com/offset-sidecar/offset-sidecar/tracing"
)

const (
	smallBuffer = 4 << 10  // a connection's own buffer; what arrives with the header of a large frame fits in it
	largeBuffer = 64 << 10 // pooled, for frames that do not
	spliceFrom  = 64 << 10 // frames from this size on are spliced: below, the calls cost more than the copying
	splicePiece = 1 << 20  // Go's pipes take this much; each piece has a deadline of its own
	maxSplices  = 32       // pipes of 1 MiB in transit at once; a user's pipes shrink past pipe-user-pages-soft
)

var largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

// frameReader reads frames from a connection. Bytes from at to end of buf are read and not yet taken.
type frameReader struct {
	conn    net.Conn
	buf     []byte
	at, end int
	small   []byte
	pooled  *[largeBuffer]byte
	idle    func() error // called before a read that may wait, if set
}

func (f *frameReader) buffered() []byte { return f.buf[f.at:f.end] }

// take marks n buffered bytes as used. They stay valid until the next need.
func (f *frameReader) take(n int) { f.at += n }

// need makes sure that n bytes at least are buffered; n may be up to largeBuffer, or more at the price of a buffer of its
// own. It fails with io.EOF only if nothing at all is buffered.
func (f *frameReader) need(n int) error {
	if f.end-f.at >= n {
		return nil
	}
	f.makeRoom(n)
	for f.end-f.at < n {
		if f.idle != nil {
			if err := f.idle(); err != nil {
				return err
			}
		}
		got, err := f.conn.Read(f.buf[f.end:])
		f.end += got
		if got > 0 {
			continue
		}
		if err == io.EOF && f.end > f.at {
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// makeRoom puts what is buffered at the start of a buffer that holds n bytes. An empty reader goes back to its small
// buffer: a connection that waits holds no more than that.
func (f *frameReader) makeRoom(n int) {
	rest := f.buffered()
	switch {
	case n <= smallBuffer && len(rest) <= smallBuffer:
		if f.small == nil {
			f.small = make([]byte, smallBuffer)
		}
		if f.pooled != nil || len(f.buf) != smallBuffer {
			f.end = copy(f.small, rest)
			f.release()
			f.buf = f.small
		} else {
			f.end = copy(f.buf, rest)
		}
	case n <= len(f.buf):
		f.end = copy(f.buf, rest)
	case n <= largeBuffer:
		large := largeBuffers.Get().(*[largeBuffer]byte)
		f.end = copy(large[:], rest)
		f.pooled = large
		f.buf = large[:]
	default:
		own := make([]byte, n)
		f.end = copy(own, rest)
		f.release()
		f.buf = own
	}
	f.at = 0
}

// release gives a pooled buffer back; nothing buffered may be used after it.
func (f *frameReader) release() {
	if f.pooled != nil {
		largeBuffers.Put(f.pooled)
		f.pooled = nil
	}
	f.buf = nil
}

// readWhole reads n bytes into memory of their own. It makes room as they come, so that a length that was only claimed
// costs nothing.
func (f *frameReader) readWhole(n int) ([]byte, error) {
	have := min(n, f.end-f.at)
	whole := make([]byte, have, min(n, max(have, largeBuffer)))
	copy(whole, f.buf[f.at:])
	f.take(have)
	for len(whole) < n {
		if len(whole) == cap(whole) {
			grown := make([]byte, len(whole), min(n, 2*cap(whole)))
			copy(grown, whole)
			whole = grown
		}
		if f.idle != nil {
			if err := f.idle(); err != nil {
				return nil, err
			}
		}
		got, err := f.conn.Read(whole[len(whole):cap(whole)])
		whole = whole[:len(whole)+got]
		if got == 0 && err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return whole, nil
}

// mover moves the rest of large frames from one connection to another.
type mover struct {
	splices chan struct{} // capacity maxSplices
	metrics *tracing.Metrics
}

// way says how long a move may take. A frame is moved in pieces.
type way interface {
	begin()                       // a piece: sets its deadlines
	moved(n int, err error) error // so many bytes of a piece; gives the error that ends the move, if it does
}

// move takes n bytes from src, of which some may be buffered, to dst.
func (m *mover) move(dst net.Conn, src *frameReader, n int, by way) error {
	if have := min(n, src.end-src.at); have > 0 {
		by.begin()
		if _, err := dst.Write(src.buf[src.at : src.at+have]); err != nil {
			return err
		}
		if err := by.moved(have, nil); err != nil {
			return err
		}
		src.take(have)
		m.metrics.Add(tracing.CopiedBytes, int64(have))
		n -= have
	}
	to, toTCP := dst.(*net.TCPConn)
	from, fromTCP := src.conn.(*net.TCPConn)
	if toTCP && fromTCP && n > 0 {
		select {
		case m.splices <- struct{}{}:
			var err error
			if n, err = m.splice(to, from, n, by); err != nil {
				return err
			}
		default: // enough of them under way
		}
	}
	return m.copy(dst, src.conn, n, by)
}

// splice moves n bytes, or gives up when a piece has come to nothing: a sender that pauses shall not keep others from
// splicing. It gives how many are left.
func (m *mover) splice(dst, src *net.TCPConn, n int, by way) (left int, err error) {
	defer func() { <-m.splices }()
	m.metrics.Add(tracing.Splices, 1)
	piece := io.LimitedReader{R: src}
	for n > 0 {
		by.begin()
		piece.N = int64(min(n, splicePiece))
		moved, err := dst.ReadFrom(&piece)
		n -= int(moved)
		m.metrics.Add(tracing.SplicedBytes, moved)
		if err == nil && moved == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err = by.moved(int(moved), err); err != nil || moved == 0 {
			return n, err
		}
	}
	return 0, nil
}

func (m *mover) copy(dst net.Conn, src net.Conn, n int, by way) error {
	if n == 0 {
		return nil
	}
	buf := largeBuffers.Get().(*[largeBuffer]byte)
	defer largeBuffers.Put(buf)
	for n > 0 {
		by.begin()
		got, err := src.Read(buf[:min(n, largeBuffer)])
		if got > 0 {
			if _, err := dst.Write(buf[:got]); err != nil {
				return err
			}
			err = nil // it comes again, if there is more to read
		} else if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		n -= got
		m.metrics.Add(tracing.CopiedBytes, int64(got))
		if err = by.moved(got, err); err != nil {
			return err
		}
	}
	return nil
}

// deadline sets a connection's deadline only when it has to be moved by more than a quarter of the time-out: setting one
// costs as much as a small frame.
type deadline struct {
	set func(time.Time) error
	at  time.Time
}

func (d *deadline) after(timeout time.Duration) {
	at := time.Now().Add(timeout)
	if ahead := d.at.Sub(at); ahead < -timeout/4 || ahead > timeout/4 {
		d.exactly(at)
	}
}

func (d *deadline) exactly(at time.Time) {
	d.at = at
	_ = d.set(at) // fails on a closed connection only, and then so does what follows
}
