package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	flushAt = 32 << 10 // bytes of replies gathered before they are written though more lie ready
	keepOut = 64 << 10 // bytes of the buffer for them that a connection keeps
	direct  = 4 << 10  // replies from this size on are written from where they were read

	listenAfter = 4 // slots in a row on one leg, then the writer listens to it

	// A broker that takes longer than repeatAfter for a request that can be repeated is suspected, and another is asked.
	// If no other is well it is given repeatAlone, or repeatDown if its probes fail as well.
	repeatAfter = 1500 * time.Millisecond
	repeatAlone = 5 * time.Second
	repeatDown  = 500 * time.Millisecond
)

var (
	errStalled     = errors.New("the upstream makes no progress (--upstream-timeout)")
	errNoBrokers   = errors.New("the upstream's Metadata names no broker at all")
	errCorrelation = errors.New("the upstream's reply is for another request")
)

// writeReplies answers the slots in their order until the connection ends.
func (c *conn) writeReplies() {
	defer c.ended("writeReplies")
	defer c.close()
	err := c.write()
	if flushErr := c.flush(); err == nil {
		err = flushErr
	}
	if !c.report(err) && err != nil && c.ctx.Err() == nil {
		c.proxy.logger.Debug("client connection closed", "client", c.client.RemoteAddr(), "node", c.listener.node, "err", err)
	}
}

func (c *conn) write() error {
	for {
		s := c.inflight.oldest()
		if s == nil {
			if c.inflight.ended.Load() && c.inflight.oldest() == nil {
				return nil
			}
			err := c.flush()
			if l := c.heard(); err == nil && l != nil {
				err = c.listen(l)
			} else if err == nil {
				err = c.sleep(nil, nil, time.Time{})
			}
			if err != nil {
				return err
			}
			continue
		}
		if s.leg == nil || s.leg != c.last {
			c.last, c.streak = s.leg, 0
		}
		c.streak++
		if err := c.reply(s); err != nil {
			return err
		}
		c.inflight.pop()
		c.proxy.metrics.Add(tracing.RequestsInFlight, -1)
		if len(c.out) >= flushAt {
			if err := c.flush(); err != nil {
				return err
			}
		}
	}
}

func (c *conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.client.Write(c.out)
	c.out = c.out[:0]
	if cap(c.out) > keepOut {
		c.out = nil
	}
	return err
}

// sleep writes what is ready and waits: for the answer to a slot, or with none for a slot; for ready to be closed; or for
// a time to come, whichever is first. It may also return for no reason.
func (c *conn) sleep(s *slot, ready <-chan struct{}, until time.Time) error {
	if err := c.flush(); err != nil {
		return err
	}
	c.inflight.writerWaits.Store(true)
	if c.awake(s, !until.IsZero()) {
		return nil
	}
	var alarm <-chan time.Time
	if !until.IsZero() {
		if c.timer == nil {
			c.timer = time.NewTimer(time.Until(until))
		} else {
			c.timer.Reset(time.Until(until))
		}
		alarm = c.timer.C
	}
	select {
	case <-c.inflight.wakeWriter:
	case <-ready:
	case <-alarm:
	case <-c.ctx.Done():
		return net.ErrClosed
	}
	return nil
}

// heard gives the leg to listen to while there is no slot, if there is one: that whose end would be the answer to a
// request without a reply; or, on a connection that talks to its broker alone, that, whose next reply then needs no one
// to wake us first.
func (c *conn) heard() *leg {
	l := c.silent.Load()
	if l == nil || !l.unsure() {
		if c.streak < listenAfter {
			return nil
		}
		l = c.last
	}
	if !l.up.Load() || l.broken.Load() || l.owed > 0 {
		c.streak = 0
		return nil
	}
	return l
}

// listen waits for bytes of a leg although nothing was asked on it that has a reply. It is interrupted for any other slot.
func (c *conn) listen(l *leg) error {
	timeout := c.proxy.config.UpstreamTimeout
	if c.streak < listenAfter {
		timeout = rejectTime
	}
	l.readBy.after(timeout)
	c.inflight.listening.Store(l)
	var err error
	if c.inflight.oldest() == nil && !c.inflight.ended.Load() {
		err = l.in.need(8)
	}
	l.mu.Lock() // an interruption under way is over then
	c.inflight.listening.Store(nil)
	if l.interrupted {
		l.interrupted = false
		l.readBy.at = time.Time{}
	}
	l.mu.Unlock()
	switch {
	case c.ctx.Err() != nil:
		return net.ErrClosed
	case c.inflight.oldest() != nil:
		return nil // and the leg's error, if there is one, comes again
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.streak = 0
		return nil
	case err == nil && len(l.in.buffered()) == 0:
		return nil
	}
	// It has ended, or sends what nobody asked for.
	l.broken.Store(true)
	c.streak = 0
	if err == nil || !l.unsure() || l.finished() {
		return nil
	}
	c.close()
	return c.rejected(l, errLegEnded, l.newestSilent())
}

// awake looks, after the others were told that we sleep, whether what they would have woken us for has come already.
func (c *conn) awake(s *slot, alarmed bool) bool {
	switch {
	case s == nil:
		return c.inflight.oldest() != nil || c.inflight.ended.Load() || c.heard() != nil
	case s.kind == slotCalled:
		return s.call.done(alarmed)
	}
	return false // what else there is to wait for is a channel
}

// reply answers one slot.
func (c *conn) reply(s *slot) error {
	switch s.kind {
	case slotCalled:
		return c.replyCalled(s)
	case slotVersions:
		for !s.leg.settled() {
			if err := c.sleep(s, s.leg.ready, time.Time{}); err != nil {
				return err
			}
		}
		h, err := wire.ParseRequestHeader(s.request[4:])
		if err != nil {
			return err
		}
		response, err := apiVersions(h, s.request[4:], c.proxy.table.known(c.listener.node))
		if err != nil {
			return blame(tracing.MistakeRequest, "a request that Kafka would not read either: %v", err)
		}
		s.response = response
	case slotRelayed:
		err := c.relay(s)
		s.leg.answered()
		return err
	}
	c.out = wire.AppendResponse(c.out, s.correlation, s.response)
	return nil
}

// replyCalled waits for a coordinator's answer. A frame that came from a peer is passed on as it is.
func (c *conn) replyCalled(s *slot) error {
	for {
		a, until, err := s.call.result(time.Now())
		if a.none() {
			if err == nil {
				err = c.sleep(s, nil, until)
			}
			if err != nil {
				return err
			}
			continue
		}
		if a.response == nil && s.key == keyListGroups && c.listener.node != anyNode {
			if a.response, err = wire.DecodeResponse(s.key, s.version, a.frame); err != nil {
				return blame(tracing.MistakeUpstream, "a peer's reply cannot be passed on: %v", err)
			}
		}
		if a.response == nil {
			c.append(a.frame)
		} else {
			c.out = wire.AppendResponse(c.out, s.correlation, c.filter(a.response))
		}
		return nil
	}
}

// filter leaves of ListGroups, on a broker's listener, the groups of that node: clients ask every broker and put the
// answers together, not all of them by group id. The bootstrap listener lists all.
func (c *conn) filter(response kmsg.Response) kmsg.Response {
	list, ok := response.(*kmsg.ListGroupsResponse)
	nodes := c.proxy.table.nodes()
	if !ok || c.listener.node == anyNode || len(nodes) == 0 {
		return response
	}
	list.Groups = slices.DeleteFunc(list.Groups, func(g kmsg.ListGroupsResponseGroup) bool {
		node, _ := place(g.Group, nodes)
		return node != c.listener.node
	})
	return list
}

// relay brings the upstream's reply to the client.
func (c *conn) relay(s *slot) error {
	l := s.leg
	size, err := c.nextReply(s)
	if err != nil {
		return c.unanswered(s, err)
	}
	l.accepted.Store(s.silent)
	total := 4 + size
	switch {
	case s.rewrite:
		return c.relayRewritten(s, total)
	case total >= spliceFrom:
		if err := c.flush(); err != nil {
			return err
		}
		return c.proxy.mover.move(c.client, &l.in, total, reply{c, l})
	}
	if err := c.needReply(l, total, c.proxy.config.UpstreamTimeout); err != nil {
		return err
	}
	frame := l.in.buffered()[:total]
	if total < direct {
		c.out = append(c.out, frame...)
	} else if err = c.flush(); err == nil {
		_, err = c.client.Write(frame)
	}
	l.in.take(total)
	c.proxy.metrics.Add(tracing.CopiedBytes, int64(total))
	return err
}

// reply is the way of a large reply. A client may read as slowly as it likes.
type reply struct {
	c *conn
	l *leg
}

func (r reply) begin() { r.l.readBy.after(r.c.proxy.config.UpstreamTimeout) }

func (r reply) moved(n int, err error) error {
	if n > 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		return nil // the time ran out while the client did not read: the broker is not to blame
	}
	return err
}

// nextReply waits until the size and the correlation id of the slot's reply are read, and leaves them in the buffer.
func (c *conn) nextReply(s *slot) (size int, err error) {
	l := s.leg
	timeout := c.proxy.config.UpstreamTimeout + s.wait
	if s.repeatable {
		timeout = c.patience(l)
	}
	begin := time.Now()
	for !l.settled() {
		var until time.Time
		if s.repeatable {
			if until = begin.Add(timeout); time.Now().After(until) {
				return 0, errStalled
			}
		}
		if err := c.sleep(s, l.ready, until); err != nil {
			return 0, err
		}
	}
	if !l.up.Load() {
		return 0, l.err
	}
	l.in.idle = c.flush
	for ; l.owed > 0; l.owed-- {
		if err := c.discardReply(l, timeout); err != nil {
			return 0, err
		}
	}
	if err := c.needReply(l, 8, timeout); err != nil {
		return 0, err
	}
	head := l.in.buffered()
	size = int(int32(binary.BigEndian.Uint32(head)))
	if size < 4 {
		return 0, blame(tracing.MistakeUpstream, "the upstream's reply to %s claims %d bytes", kmsg.NameForKey(s.key), size)
	}
	if got := int32(binary.BigEndian.Uint32(head[4:])); got != s.correlation {
		l.broken.Store(true)
		return 0, blame(tracing.MistakeUpstream, "%v: correlation id %d instead of %d", errCorrelation, got, s.correlation)
	}
	return size, nil
}

// patience is how long a broker may take for what can be asked elsewhere.
func (c *conn) patience(l *leg) time.Duration {
	addr := l.address()
	for _, other := range c.proxy.table.others(addr, 0) {
		if !c.proxy.health.suspected(other) {
			return repeatAfter
		}
	}
	if c.proxy.health.suspected(addr) {
		return repeatDown
	}
	return repeatAlone
}

// needReply waits until n bytes of a reply are there. The time-out counts from the last progress: of the reply, or of the
// request if that is still on its way.
func (c *conn) needReply(l *leg, n int, timeout time.Duration) error {
	if len(l.in.buffered()) >= n {
		return nil
	}
	since := time.Now()
	if l.outstanding.Load() == 1 {
		since = time.Unix(0, l.sent.Load())
	}
	for have := len(l.in.buffered()); ; {
		l.readBy.after(timeout)
		err := l.in.need(n)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if now := len(l.in.buffered()); now > have {
			have, since = now, time.Now()
		}
		if sent := time.Unix(0, l.sent.Load()); sent.After(since) {
			since = sent
		}
		left := time.Until(since.Add(timeout))
		if left <= 0 {
			return errStalled
		}
		l.readBy.exactly(time.Now().Add(left))
	}
}

// discardReply reads a reply that nobody waits for any more.
func (c *conn) discardReply(l *leg, timeout time.Duration) error {
	if err := c.needReply(l, 4, timeout); err != nil {
		return err
	}
	left := 4 + int(binary.BigEndian.Uint32(l.in.buffered()))
	for left > 0 {
		if err := c.needReply(l, 1, timeout); err != nil {
			l.broken.Store(true) // in the middle of a frame
			return err
		}
		n := min(left, len(l.in.buffered()))
		l.in.take(n)
		left -= n
	}
	return nil
}

// relayRewritten puts our addresses into a reply. It is read whole: only replies without records come here.
func (c *conn) relayRewritten(s *slot, total int) error {
	l := s.leg
	if total-4 > int(c.proxy.config.MaxFrame) {
		return blame(tracing.MistakeUpstream, "the upstream's reply to %s has %d bytes, of at most %d (--max-frame)", kmsg.NameForKey(s.key), total-4, c.proxy.config.MaxFrame)
	}
	l.readBy.after(c.proxy.config.UpstreamTimeout)
	var frame []byte
	var err error
	if total <= largeBuffer {
		err = c.needReply(l, total, c.proxy.config.UpstreamTimeout)
		if err == nil {
			frame = l.in.buffered()[:total]
			l.in.take(total)
		}
	} else {
		frame, err = l.in.readWhole(total)
	}
	if err != nil {
		l.broken.Store(true)
		return c.unanswered(s, err)
	}
	c.proxy.metrics.Add(tracing.CopiedBytes, int64(total))
	rewritten, err := c.proxy.rewrite(s, frame[4:])
	if errors.Is(err, errNoBrokers) {
		if s.request == nil { // nobody else knows the client
			return c.afterDelay(err)
		}
		return c.askElsewhere(s, l.addr, err)
	}
	if err != nil {
		return blame(tracing.MistakeUpstream, "the upstream's reply cannot be passed on: %v", err)
	}
	c.append(rewritten)
	return nil
}

func (c *conn) append(frame []byte) {
	c.out = binary.BigEndian.AppendUint32(c.out, uint32(len(frame)))
	c.out = append(c.out, frame...)
}

// rewrite puts our addresses into a reply, after it has opened listeners for brokers that were not known.
func (p *Proxy) rewrite(s *slot, frame []byte) ([]byte, error) {
	if !s.rewrite {
		return frame, nil
	}
	if s.key == keyMetadata {
		endpoints, err := wire.Endpoints(s.key, s.version, frame)
		if err != nil {
			return nil, err
		}
		if len(endpoints) == 0 {
			return nil, errNoBrokers // librdkafka never recovers from such a reply (librdkafka#5301)
		}
		p.table.learn(endpoints, true)
	}
	rewritten, err := wire.RewriteResponse(s.key, s.version, frame, p.table.advertise)
	if errors.Is(err, wire.ErrUnknownNode) && s.key != keyMetadata {
		endpoints, endpointsErr := wire.Endpoints(s.key, s.version, frame)
		if endpointsErr != nil {
			return nil, err
		}
		p.table.learn(endpoints, false)
		rewritten, err = wire.RewriteResponse(s.key, s.version, frame, p.table.advertise)
	}
	return rewritten, err
}

// unanswered decides what becomes of a request whose leg gave no reply: another broker is asked if any can answer and
// none may have executed it, or it does no harm twice. Else the client is closed, as a broker would have done.
func (c *conn) unanswered(s *slot, cause error) error {
	l := s.leg
	if c.ctx.Err() != nil {
		return cause
	}
	var m *mistake
	if errors.As(cause, &m) {
		return cause
	}
	settled := l.settled()
	sent := settled && l.up.Load()
	switch {
	case sent && errors.Is(cause, errStalled):
		l.owed++
		c.proxy.suspect(l.addr, cause)
	case !settled:
		l.owed++ // it is sent once the leg is up
	case sent:
		l.broken.Store(true)
		if err := unreadable(s.request); err != nil { // nor may it close the other brokers' connections
			return blame(tracing.MistakeRequest, "a request that Kafka would not read either: %v", err)
		}
	}
	if s.request == nil || sent && !s.repeatable {
		if !sent {
			return c.afterDelay(cause)
		}
		return c.closedOn(s, cause)
	}
	if sent && !errors.Is(cause, errStalled) {
		c.proxy.suspect(l.addr, cause)
	}
	return c.askElsewhere(s, l.address(), cause)
}

// unreadable says why a broker would not read a request that is kept. It is asked once one has closed the connection.
func unreadable(request []byte) error {
	if request == nil {
		return nil
	}
	h, err := wire.ParseRequestHeader(request[4:])
	if err != nil {
		return err
	}
	if _, err = wire.DecodeRequest(h, request[4:]); errors.Is(err, wire.ErrShort) || errors.Is(err, wire.ErrMalformed) {
		return err
	}
	return nil
}

// closedOn names the client's mistake where the upstream has closed the connection on a request: that is how Kafka answers
// a key or a version that it does not know, which are not in its ApiVersions, and what it cannot read.
func (c *conn) closedOn(s *slot, cause error) error {
	upstream := c.proxy.table.known(c.listener.node).upstream
	removed := s.key == keyProduce && s.version < 3 // which Kafka 4 shows for librdkafka's sake (KAFKA-18659)
	if errors.Is(cause, errStalled) {
		return cause
	}
	if upstream == nil || shows(upstream, s.key, s.version) && !(removed && !shows(upstream, keyFetch, 3)) {
		what := fmt.Sprintf("a %s request (api key %d, version %d)", kmsg.NameForKey(s.key), s.key, s.version)
		if s.leg.accepted.Load() != s.silent {
			what += " or, before it, " + s.leg.newestSilent()
		}
		if err := c.flush(); err != nil {
			return err
		}
		c.close()
		return c.rejected(s.leg, cause, what)
	}
	return blame(tracing.MistakeRequest, "api key %d (%s) version %d is not known to the upstream, which has closed the connection", s.key, kmsg.NameForKey(s.key), s.version)
}

// rejected names the request upon which a broker has closed a leg, unless it has closed it because it ends itself: that
// is found out by dialling it, for which the client need not wait. Both of the connection's goroutines may come here.
func (c *conn) rejected(l *leg, cause error, what string) error {
	if l.blamed.Swap(true) || c.proxy.health.suspected(l.addr) {
		return cause
	}
	ctx, cancel := context.WithTimeout(c.proxy.ctx, dialTimeout)
	defer cancel()
	conn, _, err := c.proxy.connect(ctx, l.addr)
	if err != nil {
		return cause
	}
	_ = conn.Close()
	return blame(tracing.MistakeRequest, "broker %s has closed the connection upon %s: it cannot read it, or refuses it", l.addr, what)
}

func shows(upstream *kmsg.ApiVersionsResponse, key, version int16) bool {
	return slices.ContainsFunc(upstream.ApiKeys, func(a kmsg.ApiVersionsResponseApiKey) bool {
		return a.ApiKey == key && versions{a.MinVersion, a.MaxVersion}.has(version)
	})
}

// afterDelay keeps the client waiting a little before it is closed for a broker that cannot be reached.
func (c *conn) afterDelay(cause error) error {
	if err := c.flush(); err != nil {
		return err
	}
	c.pause(c.listener.failureDelay())
	return cause
}

// askElsewhere asks other brokers one after the other, on a connection for this one question. While none is reachable,
// what is known answers instead.
func (c *conn) askElsewhere(s *slot, avoid string, cause error) error {
	if err := c.flush(); err != nil {
		return err
	}
	addrs := c.proxy.table.others(avoid, int(c.session.client.Session[0]))
	addrs = slices.DeleteFunc(addrs, c.proxy.health.suspected) // probes have just asked them
	for len(addrs) > 0 && c.ctx.Err() == nil {
		frame, addr, err := c.proxy.ask(c.ctx, addrs, s)
		if err == nil {
			c.append(frame)
			return nil
		}
		cause = err
		var sent *sentError
		if !errors.As(err, &sent) {
			break // all of them were tried
		}
		if !s.repeatable {
			return err
		}
		addrs = slices.DeleteFunc(addrs, func(a string) bool { return a == addr })
	}
	if s.repeatable && c.ctx.Err() == nil {
		h, err := wire.ParseRequestHeader(s.request[4:])
		if err != nil {
			return err
		}
		if req, err := wire.DecodeRequest(h, s.request[4:]); err == nil {
			if kept := c.proxy.table.kept(req); kept != nil {
				c.out = wire.AppendResponse(c.out, s.correlation, kept)
				return nil
			}
		}
	}
	return c.afterDelay(cause)
}

// sentError is a failure after the request had gone out.
type sentError struct{ err error }

func (e *sentError) Error() string { return e.err.Error() }
func (e *sentError) Unwrap() error { return e.err }

// ask puts one request to the first of these addresses that can be dialled, and gives the reply as the client shall see
// it, without its size.
func (p *Proxy) ask(ctx context.Context, addrs []string, s *slot) (reply []byte, addr string, err error) {
	conn, addr, err := p.dialFirst(ctx, addrs)
	if err != nil {
		return nil, addr, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer func() { _ = conn.Close() }()
	timeout := p.config.UpstreamTimeout
	if s.repeatable {
		timeout = min(timeout, dialTimeout)
	}
	_ = conn.SetDeadline(time.Now().Add(timeout))
	frame, err := exchange(conn, s.request, p.config.MaxFrame)
	if err != nil {
		if ctx.Err() == nil {
			p.suspect(addr, err)
		}
		return nil, addr, &sentError{fmt.Errorf("asking %s: %w", addr, err)}
	}
	if got := int32(binary.BigEndian.Uint32(frame)); got != s.correlation {
		return nil, addr, &sentError{errCorrelation}
	}
	if reply, err = p.rewrite(s, frame); err != nil {
		return nil, addr, &sentError{err}
	}
	return reply, addr, nil
}

func exchange(conn net.Conn, request []byte, maxFrame int32) ([]byte, error) {
	if _, err := conn.Write(request); err != nil {
		return nil, err
	}
	var head [4]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, err
	}
	size := int32(binary.BigEndian.Uint32(head[:]))
	if size < 4 || size > maxFrame {
		return nil, fmt.Errorf("a reply of %d bytes, of at most %d (--max-frame)", size, maxFrame)
	}
	in := frameReader{conn: conn}
	return in.readWhole(int(size))
}
