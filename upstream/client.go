package upstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// ErrClosed is given to those who wait when the client closes.
var ErrClosed = errors.New("the client of the upstream is closed")

const (
	refreshEvery  = 30 * time.Second
	nudgedAfter   = 250 * time.Millisecond // between two questions, however often Nudge is called
	firstPause    = 250 * time.Millisecond // after an error; doubles
	longestPause  = 5 * time.Second
	dialTimeout   = 3 * time.Second
	askTimeout    = 5 * time.Second
	hedgeAfter    = 200 * time.Millisecond // without a reply another broker is asked as well
	maxHedges     = 8
	retries       = 16              // of one question, where a broker refuses the connection: each asks another broker
	remindEvery   = 5 * time.Minute // between two log lines while the upstream stays away
	maxReplyBytes = 64 << 20
)

const noBroker = math.MaxInt32

// Config says where the upstream is.
type Config struct {
	Seeds    []string // host:port; all are tried, and their names resolved anew each time
	ClientID string
	Logger   *slog.Logger
	// Dialer replaces the network; nil for the real one.
	Dialer func(ctx context.Context, network, host string) (net.Conn, error)
}

// Broker is one upstream broker at its own address.
type Broker struct {
	ID   int32
	Host string
	Port int32
	Rack *string
}

// Brokers is what is known of the cluster. It is shared: nobody may change it.
type Brokers struct {
	ClusterID    string
	ControllerID int32     // -1 if unknown; a KRaft cluster names any live broker
	Brokers      []Broker  // in ascending order of their ids
	At           time.Time // when this was asked for
}

// Client learns of the upstream's brokers and topics. Its methods may be called from any goroutine.
type Client struct {
	log    *slog.Logger
	seeds  []string
	kafka  *kgo.Client
	opts   []kgo.Opt // of kafka
	nudge  chan struct{}
	closed chan struct{}

	brokers   atomic.Pointer[Brokers]
	mu        sync.Mutex // guards onBrokers
	onBrokers []func(Brokers)
	once      sync.Once // closes closed

	metadataVersion atomic.Int32 // of the last reply; -1 before
	answered        atomic.Int32 // the broker that has answered last, by kgo's numbers; noBroker when it failed since
	turn            atomic.Uint32
	topics          table
	asking          asking

	failingSince time.Time // Run's own, like the next
	remindedAt   time.Time
}

// New makes a client, which does nothing before Run. It fails only for a configuration that cannot work.
func New(c Config) (*Client, error) {
	if len(c.Seeds) == 0 {
		return nil, errors.New("no address of an upstream broker")
	}
	for _, seed := range c.Seeds {
		if _, _, err := net.SplitHostPort(seed); err != nil {
			return nil, fmt.Errorf("upstream address %q is not HOST:PORT: %w", seed, err)
		}
	}
	dialer := c.Dialer
	if dialer == nil {
		dialer = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	bounded := func(ctx context.Context, network, host string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		return dialer(ctx, network, host)
	}
	opts := []kgo.Opt{
		kgo.SeedBrokers(c.Seeds...),
		kgo.ClientID(c.ClientID),
		kgo.SoftwareNameAndVersion("offset-sidecar", "1"),
		kgo.Dialer(bounded),
		kgo.DisableClientMetrics(),
		kgo.MetadataMaxAge(time.Hour), // kgo's own refresh; ours is Run
		kgo.MetadataMinAge(nudgedAfter),
		kgo.RequestRetries(max(retries, 2*len(c.Seeds))),
		kgo.RetryTimeout(askTimeout),
		kgo.RetryBackoffFn(func(tries int) time.Duration { return time.Duration(tries) * 10 * time.Millisecond }),
		kgo.RequestTimeoutOverhead(dialTimeout),
		kgo.BrokerMaxReadBytes(maxReplyBytes),
	}
	kafka, err := kgo.NewClient(opts...)
	if err != nil {
		return nil, fmt.Errorf("configuring the client of the upstream: %w", err)
	}
	log := c.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	client := &Client{
		log:    log,
		seeds:  slices.Clone(c.Seeds),
		kafka:  kafka,
		opts:   opts,
		nudge:  make(chan struct{}, 1),
		closed: make(chan struct{}),
		asking: asking{wake: make(chan struct{}, 1)},
	}
	client.brokers.Store(&Brokers{ControllerID: -1})
	client.metadataVersion.Store(-1)
	client.answered.Store(noBroker)
	return client, nil
}

// Brokers gives the last known list of brokers that was not empty; before that, an empty one.
func (c *Client) Brokers() Brokers { return *c.brokers.Load() }

// OnBrokers has fn called whenever the cluster id or a broker changes, by one goroutine at a time and before Brokers
// shows the change: what fn does (opening listeners) is done by then. The controller is not counted as a change.
func (c *Client) OnBrokers(fn func(Brokers)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onBrokers = append(c.onBrokers, fn)
}

// Nudge says that something failed or that an unknown node id was seen: the brokers are asked for now, though at most
// every 250 ms. It never blocks.
func (c *Client) Nudge() {
	select {
	case c.nudge <- struct{}{}:
	default:
	}
}

// Run asks for brokers and topics until ctx ends or the client closes.
func (c *Client) Run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, c.asking.fail)
	defer stop()
	var topics sync.WaitGroup
	topics.Go(func() { c.askTopics(ctx) })
	defer topics.Wait()
	defer cancel()

	pause := firstPause
	for {
		next := refreshEvery
		err := c.askBrokers(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			c.failed(err)
			next, pause = pause, min(2*pause, longestPause)
		default:
			c.succeeded()
			pause = firstPause
			c.asking.renew(c.topics.wanted(time.Now()))
		}
		if !c.rest(ctx, next) {
			return
		}
	}
}

// rest waits for as long as given, or for a nudge; it says whether to go on.
func (c *Client) rest(ctx context.Context, wait time.Duration) bool {
	least := time.NewTimer(nudgedAfter)
	defer least.Stop()
	whole := time.NewTimer(wait)
	defer whole.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-c.closed:
		return false
	case <-least.C:
	}
	select {
	case <-ctx.Done():
		return false
	case <-c.closed:
		return false
	case <-whole.C:
	case <-c.nudge:
	}
	return true
}

// askBrokers asks for the brokers and no topics. In Metadata 0, which no broker since 0.10 needs, an empty list would
// mean all topics; from 1 on it means none.
func (c *Client) askBrokers(ctx context.Context) error {
	req := kmsg.NewPtrMetadataRequest()
	req.Topics = []kmsg.MetadataRequestTopic{}
	_, err := c.metadata(ctx, req)
	return err
}

// metadata asks any broker, and takes in what the reply says of the cluster.
func (c *Client) metadata(ctx context.Context, req *kmsg.MetadataRequest) (*kmsg.MetadataResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req.AllowAutoTopicCreation = false
	asked := time.Now()
	resp, err := c.hedge(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := kerr.ErrorForCode(resp.ErrorCode); err != nil {
		return nil, err
	}
	if len(resp.Brokers) == 0 {
		return nil, errors.New("it named no brokers")
	}
	c.metadataVersion.Store(int32(resp.Version))
	c.learn(resp, asked)
	return resp, nil
}

// hedge asks the broker that has answered last, and another whenever one fails or none has answered for a while: a
// broker may be silent (its host gone, its packets dropped) where a dead process would refuse. A question that is no
// longer waited for ends by itself: kgo gives it up when its broker's dial or read times out, or the client closes.
func (c *Client) hedge(ctx context.Context, req *kmsg.MetadataRequest) (*kmsg.MetadataResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	replies := make(chan kgo.ResponseShard, maxHedges)
	waiting, left := 0, c.targets(len(req.Topics) == 0)
	ask := func() {
		if len(left) == 0 || ctx.Err() != nil {
			return
		}
		own, broker := *req, left[0] // kgo writes its version into the request
		left = left[1:]
		waiting++
		go func() { replies <- c.askOne(ctx, broker, &own) }()
	}
	ask()
	again := time.NewTicker(hedgeAfter)
	defer again.Stop()
	for {
		select {
		case r := <-replies:
			if r.Err == nil {
				c.answered.Store(r.Meta.NodeID)
				return r.Resp.(*kmsg.MetadataResponse), nil
			}
			c.answered.CompareAndSwap(r.Meta.NodeID, noBroker)
			waiting--
			if ask(); waiting == 0 {
				return nil, r.Err
			}
		case <-again.C:
			ask()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// targets lists whom to ask, in order: the broker that has answered last, some others, and whose turn it is with kgo,
// which also tries the seeds. Only when that comes first, as for the list of brokers, does kgo keep its own up to date.
func (c *Client) targets(kgoFirst bool) []int32 {
	targets := make([]int32, 0, maxHedges)
	last := c.answered.Load()
	if kgoFirst || last == noBroker {
		targets = append(targets, noBroker)
	}
	if last != noBroker {
		targets = append(targets, last)
	}
	known := c.brokers.Load().Brokers
	turn := int(c.turn.Add(1))
	for i := range known {
		if id := known[(turn+i)%len(known)].ID; id != last && len(targets) < maxHedges-2 {
			targets = append(targets, id)
		}
	}
	for len(targets) < maxHedges {
		targets = append(targets, noBroker)
	}
	return targets
}

// askOne asks that broker, or the one whose turn it is: then kgo goes on to the next until one does not refuse.
func (c *Client) askOne(ctx context.Context, broker int32, req *kmsg.MetadataRequest) kgo.ResponseShard {
	if broker == noBroker {
		return c.kafka.RequestSharded(ctx, req)[0]
	}
	resp, err := c.kafka.Broker(int(broker)).Request(ctx, req)
	return kgo.ResponseShard{Meta: kgo.BrokerMetadata{NodeID: broker}, Resp: resp, Err: err}
}

// learn keeps the brokers of a reply and tells of a change. Replies may come out of order, as brokers and topics are
// asked for by two goroutines.
func (c *Client) learn(resp *kmsg.MetadataResponse, asked time.Time) {
	now := Brokers{ControllerID: resp.ControllerID, At: asked}
	if resp.Version < 1 {
		now.ControllerID = -1
	}
	if resp.ClusterID != nil {
		now.ClusterID = *resp.ClusterID
	}
	for _, b := range resp.Brokers {
		now.Brokers = append(now.Brokers, Broker{ID: b.NodeID, Host: b.Host, Port: b.Port, Rack: b.Rack})
	}
	slices.SortFunc(now.Brokers, func(a, b Broker) int { return int(a.ID) - int(b.ID) })
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.brokers.Load()
	if asked.Before(before.At) {
		return
	}
	if now.ClusterID != before.ClusterID || !slices.EqualFunc(now.Brokers, before.Brokers, same) {
		for _, fn := range c.onBrokers {
			fn(now)
		}
	}
	c.brokers.Store(&now)
}

func same(a, b Broker) bool {
	if a.ID != b.ID || a.Host != b.Host || a.Port != b.Port || (a.Rack == nil) != (b.Rack == nil) {
		return false
	}
	return a.Rack == nil || *a.Rack == *b.Rack
}

// failed logs that the upstream cannot be asked: when that begins, and from time to time while it lasts.
func (c *Client) failed(err error) {
	now := time.Now()
	if c.failingSince.IsZero() {
		c.failingSince = now
	} else if now.Sub(c.remindedAt) < remindEvery {
		return
	}
	c.remindedAt = now
	what := "upstream cannot be reached, trying on"
	if dial := (*net.OpError)(nil); !errors.As(err, &dial) || dial.Op != "dial" {
		what = "upstream does not answer as a Kafka broker does, trying on"
	}
	c.log.Warn(what, "upstream", strings.Join(c.seeds, ","), "since", c.failingSince.Format(time.RFC3339), "error", err)
}

func (c *Client) succeeded() {
	if !c.failingSince.IsZero() {
		c.log.Info("upstream answers again", "upstream", strings.Join(c.seeds, ","), "after", time.Since(c.failingSince).Round(time.Millisecond))
		c.failingSince = time.Time{}
	}
}

// Close ends Run and fails all that wait.
func (c *Client) Close() {
	c.once.Do(func() { close(c.closed) })
	c.asking.fail()
	c.kafka.Close()
}
