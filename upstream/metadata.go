package upstream

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	maxTopics       = 65536           // names kept; those not asked for longest are dropped first
	keepUnused      = time.Hour       // how long a name is kept up to date after it was last asked for
	refreshDeadline = 2 * time.Second // of a Refresh
	topicsPerAsk    = 2000            // names and ids in one request
	firstWithIDs    = 10              // Metadata version that gives topic ids (KIP-516)
	firstByID       = 12              // Metadata version that can be asked by topic id
	firstNoCreate   = 4               // Metadata version that can be told not to create topics (KIP-4)
)

var errDeadline = errors.New("the upstream did not answer in time")

// topic is one topic as the upstream described it last. Only used changes after it was made.
type topic struct {
	name       string
	id         [16]byte
	partitions int32
	usedAt     time.Time   // when used was last seen, guarded by the table's lock
	used       atomic.Bool // since then
}

// table holds what is known of topics. Reading it is cheap: every offset commit does.
type table struct {
	mu     sync.RWMutex
	byName map[string]*topic
	byID   map[[16]byte]*topic
}

// Topic gives a topic's id (zero if the upstream has none) and its number of partitions; known is false for topics
// that the upstream does not have or that nobody has asked for with Refresh.
func (c *Client) Topic(name string) (id [16]byte, partitions int32, known bool) {
	c.topics.mu.RLock()
	t := c.topics.byName[name]
	c.topics.mu.RUnlock()
	if t == nil {
		return id, 0, false
	}
	t.touch()
	return t.id, t.partitions, true
}

// TopicName gives the name of a topic id, on the same terms as Topic.
func (c *Client) TopicName(id [16]byte) (string, bool) {
	c.topics.mu.RLock()
	t := c.topics.byID[id]
	c.topics.mu.RUnlock()
	if t == nil {
		return "", false
	}
	t.touch()
	return t.name, true
}

func (t *topic) touch() {
	if !t.used.Load() { // many readers, one cache line
		t.used.Store(true)
	}
}

// put adds or replaces a topic; one that was deleted and made again has a new id.
func (t *table) put(name string, id [16]byte, partitions int32, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byName == nil {
		t.byName, t.byID = make(map[string]*topic), make(map[[16]byte]*topic)
	}
	fresh := &topic{name: name, id: id, partitions: partitions, usedAt: now}
	if old := t.byName[name]; old != nil {
		fresh.usedAt = old.usedAt
		fresh.used.Store(old.used.Load())
		if old.id != id {
			delete(t.byID, old.id)
		}
	} else if len(t.byName) >= maxTopics {
		t.dropOldest(maxTopics / 16)
	}
	t.byName[name] = fresh
	if id != ([16]byte{}) {
		if other := t.byID[id]; other != nil && other.name != name {
			delete(t.byName, other.name)
		}
		t.byID[id] = fresh
	}
}

// dropOldest makes room; the lock is held.
func (t *table) dropOldest(n int) {
	all := make([]*topic, 0, len(t.byName))
	for _, topic := range t.byName {
		all = append(all, topic)
	}
	slices.SortFunc(all, func(a, b *topic) int {
		if a.used.Load() != b.used.Load() {
			if a.used.Load() {
				return 1
			}
			return -1
		}
		return a.usedAt.Compare(b.usedAt)
	})
	for _, topic := range all[:min(n, len(all))] {
		t.drop(topic)
	}
}

func (t *table) drop(topic *topic) {
	delete(t.byName, topic.name)
	if t.byID[topic.id] == topic {
		delete(t.byID, topic.id)
	}
}

func (t *table) removeName(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if topic := t.byName[name]; topic != nil {
		t.drop(topic)
	}
}

func (t *table) removeID(id [16]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if topic := t.byID[id]; topic != nil {
		t.drop(topic)
	}
}

// wanted lists the names that were asked for within the last hour, and forgets the others.
func (t *table) wanted(now time.Time) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	names := make([]string, 0, len(t.byName))
	for _, topic := range t.byName {
		if topic.used.Swap(false) {
			topic.usedAt = now
		}
		if now.Sub(topic.usedAt) > keepUnused {
			t.drop(topic)
			continue
		}
		names = append(names, topic.name)
	}
	return names
}

// waiter is one call of Refresh.
type waiter struct {
	done     func(error)
	answered atomic.Bool
	deadline *time.Timer // answers too
}

func (w *waiter) answer(err error) {
	if w.answered.CompareAndSwap(false, true) {
		w.done(err)
	}
}

// asking gathers what is to be asked of the upstream next: all Refreshes that come while a request is in flight share
// the one after it.
type asking struct {
	wake chan struct{}

	mu      sync.Mutex
	names   map[string]struct{}
	ids     map[[16]byte]struct{}
	waiters []*waiter
	over    bool
}

// Refresh asks the upstream for these topics and calls done once, from any goroutine: with nil when the table holds
// the upstream's answer, with an error when the upstream could not be asked within 2 s. It never blocks, nor does it
// call done before it has returned.
func (c *Client) Refresh(names []string, ids [][16]byte, done func(error)) {
	c.asking.mu.Lock()
	defer c.asking.mu.Unlock()
	switch {
	case c.asking.over:
		time.AfterFunc(0, func() { done(ErrClosed) })
		return
	case len(names)+len(ids) == 0:
		time.AfterFunc(0, func() { done(nil) })
		return
	}
	w := &waiter{done: done}
	w.deadline = time.AfterFunc(refreshDeadline, func() { w.answer(errDeadline) })
	c.asking.add(names, ids)
	c.asking.waiters = append(c.asking.waiters, w)
}

// renew has known topics asked for again, for nobody in particular.
func (a *asking) renew(names []string) {
	if len(names) == 0 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.over {
		a.add(names, nil)
	}
}

func (a *asking) add(names []string, ids [][16]byte) {
	if a.names == nil {
		a.names, a.ids = make(map[string]struct{}), make(map[[16]byte]struct{})
	}
	for _, name := range names {
		a.names[name] = struct{}{}
	}
	for _, id := range ids {
		a.ids[id] = struct{}{}
	}
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *asking) take() (names []string, ids [][16]byte, waiters []*waiter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name := range a.names {
		names = append(names, name)
	}
	for id := range a.ids {
		ids = append(ids, id)
	}
	waiters = a.waiters
	a.names, a.ids, a.waiters = nil, nil, nil
	return names, ids, waiters
}

// fail ends all waiting, now and in future.
func (a *asking) fail() {
	a.mu.Lock()
	a.over = true
	waiters := a.waiters
	a.waiters = nil
	a.mu.Unlock()
	for _, w := range waiters {
		w.deadline.Stop()
		w.answer(ErrClosed)
	}
}

// askTopics is the goroutine that asks for topics, one request at a time.
func (c *Client) askTopics(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.closed:
			return
		case <-c.asking.wake:
		}
		names, ids, waiters := c.asking.take()
		err := c.ask(ctx, names, ids)
		if err != nil && ctx.Err() == nil {
			c.Nudge()
		}
		for _, w := range waiters {
			w.deadline.Stop()
			w.answer(err)
		}
	}
}

// ask asks for topics by name and by id, in as many requests as it takes.
func (c *Client) ask(ctx context.Context, names []string, ids [][16]byte) error {
	ctx, cancel := context.WithTimeout(ctx, refreshDeadline)
	defer cancel()
	if c.metadataVersion.Load() < 0 {
		if err := c.askBrokers(ctx); err != nil {
			return err
		}
	}
	version := c.metadataVersion.Load()
	if version < firstWithIDs {
		ids = nil // no client of such a cluster can know one
	}
	if version < firstNoCreate && len(names) > 0 || version < firstByID && len(ids) > 0 {
		return c.askAll(ctx, names, ids)
	}
	for len(names)+len(ids) > 0 {
		someNames, someIDs := names[:min(len(names), topicsPerAsk)], ids[:min(len(ids), topicsPerAsk)]
		names, ids = names[len(someNames):], ids[len(someIDs):]
		if err := c.askSome(ctx, someNames, someIDs); err != nil {
			return err
		}
	}
	return nil
}

func (c *Client) askSome(ctx context.Context, names []string, ids [][16]byte) error {
	req := kmsg.NewPtrMetadataRequest()
	for _, name := range names {
		t := kmsg.NewMetadataRequestTopic()
		t.Topic = kmsg.StringPtr(name)
		req.Topics = append(req.Topics, t)
	}
	// Kafka wants all topics of a request to have a name or all to have an id (KafkaApis.handleTopicMetadataRequest).
	if len(names) > 0 && len(ids) > 0 {
		if err := c.askSome(ctx, nil, ids); err != nil {
			return err
		}
		ids = nil
	}
	for _, id := range ids {
		t := kmsg.NewMetadataRequestTopic()
		t.TopicID = id
		req.Topics = append(req.Topics, t)
	}
	resp, err := c.metadata(ctx, req)
	if err != nil {
		return err
	}
	for i := range resp.Topics {
		c.take(&resp.Topics[i])
	}
	return nil
}

// askAll lists all topics and takes from the list what was asked for. Brokers before 0.11 would create a topic that
// is asked for by name, and those before 3.1 cannot be asked by id.
func (c *Client) askAll(ctx context.Context, names []string, ids [][16]byte) error {
	req := kmsg.NewPtrMetadataRequest()
	req.Topics = nil
	resp, err := c.metadata(ctx, req)
	if err != nil {
		return err
	}
	byName, byID := make(map[string]bool, len(names)), make(map[[16]byte]bool, len(ids))
	for _, name := range names {
		byName[name] = true
	}
	for _, id := range ids {
		byID[id] = true
	}
	for i := range resp.Topics {
		t := &resp.Topics[i]
		if t.Topic != nil && (byName[*t.Topic] || byID[t.TopicID]) {
			c.take(t)
			delete(byName, *t.Topic)
			delete(byID, t.TopicID)
		}
	}
	for name := range byName {
		c.topics.removeName(name)
	}
	for id := range byID {
		c.topics.removeID(id)
	}
	return nil
}

// take keeps what the upstream says of one topic.
func (c *Client) take(t *kmsg.MetadataResponseTopic) {
	switch t.ErrorCode {
	case 0, kerr.LeaderNotAvailable.Code:
		if t.Topic != nil && len(t.Partitions) > 0 {
			c.topics.put(*t.Topic, t.TopicID, int32(len(t.Partitions)), time.Now())
		}
	case kerr.UnknownTopicOrPartition.Code, kerr.InvalidTopicException.Code, kerr.UnknownTopicID.Code, kerr.TopicAuthorizationFailed.Code:
		if t.Topic != nil {
			c.topics.removeName(*t.Topic)
		} else {
			c.topics.removeID(t.TopicID)
		}
	}
	// Any other error says nothing about the topic: what was known still holds.
}
