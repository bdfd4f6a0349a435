package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	lookAtClient  = time.Second     // how often a client whose requests are not read is looked at
	endGrace      = 2 * time.Second // for what is outstanding when a client has ended its side or made a mistake
	maxHeader     = 1 << 17         // bytes in which a request header must end: a client id has 32 KiB at most
	maxRepeatable = 1 << 20         // bytes of a request that is kept to ask another broker
)

// More api keys by name; see versions.go for the others.
const (
	keyMetadata                = 3
	keySaslHandshake           = 17
	keyInitProducerID          = 22
	keyDescribeConfigs         = 32
	keyAlterConfigs            = 33
	keySaslAuthenticate        = 36
	keyIncrementalAlterConfigs = 44
	keyDescribeCluster         = 60
	keyDescribeTopicPartitions = 75
)

// readRequests reads the client until it ends its side or makes a mistake. What is outstanding is then still answered,
// within reason.
func (c *conn) readRequests() {
	defer c.ended("readRequests")
	defer c.in.release()
	err := c.read()
	c.report(err)
	c.session.drop()
	if errors.Is(err, errUnsent) {
		c.pause(c.listener.failureDelay())
	}
	c.inflight.end()
	c.pause(endGrace)
	c.close()
}

// report names a mistake in the log, if it is one.
func (c *conn) report(err error) bool {
	var m *mistake
	if !errors.As(err, &m) {
		return false
	}
	c.proxy.metrics.Mistake(m.kind)
	host := c.client.RemoteAddr().String()
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	c.proxy.complainOf(fmt.Sprint(m.kind, host), mistakeLines,
		fmt.Sprintf("client %s at %s: %s; its connection is closed", host, c.client.LocalAddr(), m.text))
	return true
}

func (c *conn) read() error {
	for {
		if err := c.readRequest(); err != nil {
			return err
		}
	}
}

// readRequest reads one frame as far as it must, and sends it on its way.
func (c *conn) readRequest() error {
	if err := c.in.need(4); err != nil {
		return c.cutShort(err)
	}
	size := int32(binary.BigEndian.Uint32(c.in.buffered()))
	if size < 8 || size > c.proxy.config.MaxFrame {
		return c.oddSize(size)
	}
	total := 4 + int(size)
	h, err := c.header(total)
	if err != nil {
		return err
	}
	c.proxy.metrics.Request(h.APIKey)
	r := routeOf(h.APIKey)
	if h.APIKey == keySaslHandshake && h.APIVersion < minSaslHandshake {
		r.action = refuse
	}
	if r.action == pass || r.action == rewrite {
		kept := 0
		if !r.bound && total <= maxRepeatable {
			kept = total
		}
		if !c.reserve(kept) {
			return net.ErrClosed
		}
		return c.relayRequest(h, r, total)
	}
	if size > c.proxy.config.MaxGroupFrame {
		return blame(tracing.MistakeFrameSize, "a %s request of %d bytes, more than the %d that group requests may have", kmsg.NameForKey(h.APIKey), size, c.proxy.config.MaxGroupFrame)
	}
	if !c.reserve(total) {
		return net.ErrClosed
	}
	frame, err := c.in.readWhole(total)
	if err != nil {
		return err
	}
	return c.answer(h, r, frame)
}

// reserve waits for room for a request of which so many bytes are kept until it is answered. A client that goes meanwhile
// is noticed by looking, as its end lies behind requests that are not read: what is held for it is dropped, and it is
// given as long as any that ends its side.
func (c *conn) reserve(bytes int) bool {
	if c.inflight.room(bytes) {
		return true
	}
	look := time.NewTicker(lookAtClient)
	defer look.Stop()
	var gone time.Time
	for !c.inflight.room(bytes) {
		c.inflight.readerWaits.Store(true)
		if c.inflight.room(bytes) {
			break
		}
		select {
		case <-c.inflight.wakeReader:
		case <-c.ctx.Done():
			return false
		case now := <-look.C:
			switch {
			case gone.IsZero() && hungUp(c.client):
				gone = now
				c.session.drop()
			case !gone.IsZero() && now.Sub(gone) >= endGrace:
				return false
			}
		}
	}
	return true
}

func (c *conn) oddSize(size int32) error {
	first := c.in.buffered()[:4]
	switch name := wire.Sniff(first); {
	case name != "" && first[0] < ' ':
		return blame(tracing.MistakeTLS, "speaks %s, but this port is plain: set security.protocol to PLAINTEXT", name)
	case name != "":
		return blame(tracing.MistakeHTTP, "speaks %s, but this is a Kafka port", name)
	case size >= 0 && size < 8:
		return blame(tracing.MistakeHeader, "a request of %d bytes, too short for a header", size)
	}
	return blame(tracing.MistakeFrameSize, "a request that claims %d bytes, of at most %d (--max-frame)", size, c.proxy.config.MaxFrame)
}

// cutShort names the mistake of a client that ends its side within a header. Ending within a body is none: that is what
// a client leaves that is killed while it sends.
func (c *conn) cutShort(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return blame(tracing.MistakeHeader, "it has ended %d bytes after a request's begin, within the header", len(c.in.buffered()))
	}
	return err
}

// header reads the request header, of which the frame's first bytes are usually enough.
func (c *conn) header(total int) (wire.RequestHeader, error) {
	for need := 12; ; need = min(total, len(c.in.buffered())+1) {
		if err := c.in.need(need); err != nil {
			return wire.RequestHeader{}, c.cutShort(err)
		}
		have := c.in.buffered()
		key, version := int16(binary.BigEndian.Uint16(have[4:])), int16(binary.BigEndian.Uint16(have[6:]))
		if !served(key, version) { // of a version that nobody knows, the rest of the header may be anything
			return wire.RequestHeader{}, blame(tracing.MistakeRequest, "%s version %d is not served", kmsg.NameForKey(key), version)
		}
		whole := len(have) >= total
		h, err := wire.ParseRequestHeader(have[4:min(len(have), total)])
		switch {
		case err == nil:
			return h, nil
		case !errors.Is(err, wire.ErrShort):
			return h, blame(tracing.MistakeHeader, "a request header that nobody can read: %v", err)
		case whole || len(have) > maxHeader:
			return h, blame(tracing.MistakeHeader, "a request of api key %d whose header does not end within the frame", h.APIKey)
		}
	}
}

// answer takes a request that does not go upstream, or only perhaps.
func (c *conn) answer(h wire.RequestHeader, r route, frame []byte) error {
	s := slot{key: h.APIKey, version: h.APIVersion, correlation: h.CorrelationID, bytes: len(frame)}
	if h.APIKey == keyApiVersions {
		return c.answerVersions(h, s, frame)
	}
	decode := wire.DecodeRequest
	if r.action == refuse {
		decode = decodeRefused
	}
	req, err := decode(h, frame[4:])
	if err != nil {
		return blame(tracing.MistakeRequest, "a request that Kafka would not read either: %v", err)
	}
	switch {
	case r.action == coordinate:
		s.kind = slotCalled
		s.call = c.session.submit(req, frame[4:], h.ClientID)
	case r.action == refuse:
		s.response = refusal(req)
	default:
		find := req.(*kmsg.FindCoordinatorRequest)
		if findsTransaction(find) {
			return c.sendToAny(h, s, frame)
		}
		s.response = findGroup(find, c.proxy.table.place)
	}
	c.push(s)
	return nil
}

func (c *conn) answerVersions(h wire.RequestHeader, s slot, frame []byte) error {
	k := c.proxy.table.known(c.listener.node)
	if k.upstream == nil { // never reached: wait for the dial, then say what we know
		s.kind, s.request = slotVersions, frame
		var err error
		if s.leg, err = c.ownLeg(); err != nil {
			return err
		}
		c.push(s)
		return nil
	}
	resp, err := apiVersions(h, frame[4:], k)
	if err != nil {
		return blame(tracing.MistakeRequest, "a request that Kafka would not read either: %v", err)
	}
	s.response = resp
	c.push(s)
	return nil
}

func (c *conn) push(s slot) {
	c.proxy.metrics.Add(tracing.RequestsInFlight, 1)
	c.inflight.push(s)
	c.inflight.signal()
}

// relayRequest sends a request upstream.
func (c *conn) relayRequest(h wire.RequestHeader, r route, total int) error {
	s := slot{
		kind: slotRelayed, key: h.APIKey, version: h.APIVersion, correlation: h.CorrelationID,
		rewrite: r.action == rewrite && (h.APIKey != keyProduce || h.APIVersion >= 10),
	}
	silent, err := c.readWait(h, total, &s)
	if err != nil {
		return err
	}
	if total > maxRepeatable || total >= spliceFrom && r.bound {
		return c.relayLarge(s, total, silent)
	}
	if !r.bound {
		frame, err := c.in.readWhole(total)
		if err != nil {
			return err
		}
		return c.sendToAny(h, s, frame)
	}
	if err := c.in.need(total); err != nil {
		return err
	}
	switch h.APIKey {
	case keyInitProducerID, keyDescribeConfigs, keyAlterConfigs, keyIncrementalAlterConfigs:
		if !isBound(h, c.in.buffered()[4:total]) {
			frame := bytes.Clone(c.in.buffered()[:total])
			c.in.take(total)
			return c.sendToAny(h, s, frame)
		}
	}
	if h.APIKey != keyProduce && h.APIKey != keyFetch {
		s.wait = ownWait(h, c.in.buffered()[4:total])
	}
	err = c.sendOwn(s, c.in.buffered()[:total], silent)
	c.in.take(total)
	if h.APIKey == keySaslHandshake || h.APIKey == keySaslAuthenticate {
		c.passed = true
	}
	return err
}

func millis(n int32) time.Duration { return time.Duration(max(n, 0)) * time.Millisecond }

// ownWait gives the time that a request of the admin client lets the broker take.
func ownWait(h wire.RequestHeader, frame []byte) time.Duration {
	if _, ok := kmsg.RequestForKey(h.APIKey).(kmsg.TimeoutRequest); !ok {
		return 0
	}
	req, err := wire.DecodeRequest(h, frame)
	if err != nil {
		return 0 // the broker will say so, too
	}
	return millis(req.(kmsg.TimeoutRequest).Timeout())
}

// readWait looks into a request for how long the broker may take, and whether it will answer at all.
func (c *conn) readWait(h wire.RequestHeader, total int, s *slot) (silent bool, err error) {
	if h.APIKey != keyProduce && h.APIKey != keyFetch {
		return false, nil
	}
	for need := min(total, 4+h.Length+8); ; need = min(total, 2*len(c.in.buffered())) {
		if err := c.in.need(need); err != nil {
			return false, err
		}
		have := c.in.buffered()
		whole := len(have) >= total
		body := have[4+h.Length : min(len(have), total)]
		if h.APIKey == keyFetch {
			if h.APIVersion < 15 && len(body) >= 4 { // the replica id comes first
				body = body[4:]
			}
			if len(body) >= 4 {
				s.wait = millis(int32(binary.BigEndian.Uint32(body)))
			}
			return false, nil
		}
		acks, timeout, err := wire.ProduceAcks(h.APIVersion, body)
		switch {
		case err == nil:
			if acks == -1 { // the broker waits for the other replicas
				s.wait = millis(timeout)
			}
			return acks == 0, nil
		case !errors.Is(err, wire.ErrShort) || whole || len(have) > maxHeader:
			return false, blame(tracing.MistakeRequest, "a Produce request without acks: %v", err)
		}
	}
}

// sendOwn sends a small frame to the listener's broker.
func (c *conn) sendOwn(s slot, frame []byte, silent bool) (err error) {
	if s.leg, err = c.ownLeg(); err != nil {
		return err
	}
	return c.send(s, frame, silent)
}

// sendToAny sends a request that any broker can answer to one that is likely to.
func (c *conn) sendToAny(h wire.RequestHeader, s slot, frame []byte) (err error) {
	s.kind, s.bytes = slotRelayed, len(frame)
	s.wait = ownWait(h, frame[4:])
	switch h.APIKey {
	case keyFindCoordinator, keyMetadata, keyDescribeCluster:
		s.repeatable, s.rewrite = true, true
	case keyDescribeTopicPartitions:
		s.repeatable = true
	}
	if c.passed {
		s.repeatable = false // another broker does not know the client
	} else {
		s.request = frame
	}
	if s.leg, err = c.anyLeg(); err != nil {
		return err
	}
	return c.send(s, frame, false)
}

func (c *conn) send(s slot, frame []byte, silent bool) error {
	if silent {
		return c.sendSilent(s.leg, frame)
	}
	s.silent = s.leg.silent.Load()
	s.leg.outstanding.Add(1)
	c.proxy.metrics.Add(tracing.RequestsInFlight, 1)
	c.inflight.push(s)
	err := s.leg.send(frame, c.ctx.Done())
	c.proxy.metrics.Add(tracing.CopiedBytes, int64(len(frame)))
	if err != nil {
		s.leg.broken.Store(true)
	}
	if err != nil || s.repeatable { // then the writer has to know how long to wait
		c.inflight.signal()
	} else {
		c.inflight.sent(s.leg)
	}
	return nil // the writer finds out by itself, and may know what to do
}

// sendSilent sends a request without a reply; if it cannot be sent, the client is told as by a broker, with a close.
func (c *conn) sendSilent(l *leg, frame []byte) error {
	c.proxy.metrics.Add(tracing.CopiedBytes, int64(len(frame)))
	c.noteSilent(l, int16(binary.BigEndian.Uint16(frame[6:])))
	if err := l.send(frame, c.ctx.Done()); err != nil {
		return err
	}
	if l.failed() {
		return errUnsent
	}
	c.inflight.sent(l)
	return nil
}

// noteSilent is called before a request without a reply is sent.
func (c *conn) noteSilent(l *leg, version int16) {
	l.silentIn.Store(int32(version))
	l.silent.Add(1)
	c.silent.Store(l)
}

// relayLarge moves a large request to the listener's broker.
func (c *conn) relayLarge(s slot, total int, silent bool) error {
	l, err := c.ownLeg()
	if err != nil {
		return err
	}
	s.leg = l
	s.silent = l.silent.Load()
	if silent {
		c.noteSilent(l, s.version)
	} else {
		l.outstanding.Add(1)
		c.push(s)
	}
	if !l.wait(c.ctx.Done()) {
		return errUnsent
	}
	err = c.proxy.mover.move(l.conn, &c.in, total, &upload{c: c, l: l})
	_ = c.client.SetReadDeadline(time.Time{})
	l.used = time.Now()
	switch {
	case err == nil && silent:
		c.inflight.sent(l)
	case err != nil:
		l.broken.Store(true)
		if silent && ended(l.conn) {
			return c.rejected(l, err, l.newestSilent())
		}
	}
	return err
}

// upload is the way of a large request. A client may take as long as it likes to send it: reading from it gives up a
// piece every little while, with nothing in between the two sockets, so that the deadline for writing can be set anew. A
// broker has --upstream-timeout to take a piece.
type upload struct {
	c    *conn
	l    *leg
	read deadline
}

func (u *upload) begin() {
	if u.read.set == nil {
		u.read.set = u.c.client.SetReadDeadline
	}
	timeout := u.c.proxy.config.UpstreamTimeout
	u.read.after(timeout / 4)
	u.l.writeBy.after(timeout + timeout/2)
}

func (u *upload) moved(n int, err error) error {
	now := time.Now()
	late := u.l.writeBy.at.Add(-u.c.proxy.config.UpstreamTimeout / 8) // deadlines may fire a little early
	if errors.Is(err, os.ErrDeadlineExceeded) && now.Before(late) {
		err = nil // the client's, then
		u.read.at = time.Time{}
	}
	if err == nil {
		u.l.sent.Store(now.UnixNano())
	}
	return err
}

var (
	// errUnsent ends a connection whose broker cannot be reached, after the replies that come before.
	errUnsent = errors.New("the upstream cannot be reached")
	// errLegEnded ends one whose broker has closed the leg, which the client has to know.
	errLegEnded = errors.New("the upstream has closed the connection")
)
