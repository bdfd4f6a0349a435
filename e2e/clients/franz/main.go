// Command franz is franz-go behind the drivers' line protocol (see e2e/doc.go).
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

func main() {
	log.SetFlags(log.Lmicroseconds)
	verb, bootstrap, topic, rest := os.Args[1], os.Args[2], os.Args[3], os.Args[4:]
	var err error
	switch verb {
	case "produce":
		err = produce(bootstrap, topic, rest[0], rest[1])
	case "consume":
		err = consume(bootstrap, topic, rest[0], rest[1])
	case "transact":
		err = transact(bootstrap, topic, rest[0])
	default:
		err = fmt.Errorf("unknown verb %q", verb)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func options(bootstrap string) []kgo.Opt {
	return []kgo.Opt{
		kgo.SeedBrokers(strings.Split(bootstrap, ",")...),
		kgo.WithLogger(kgo.BasicLogger(os.Stderr, kgo.LogLevelWarn, nil)),
		kgo.MetadataMaxAge(5 * time.Second),
	}
}

func produce(bootstrap, topic, from, to string) error {
	cl, err := kgo.NewClient(options(bootstrap)...)
	if err != nil {
		return err
	}
	defer cl.Close()
	first, _ := strconv.Atoi(from)
	last, _ := strconv.Atoi(to)
	var rs []*kgo.Record
	for i := first; i < last; i++ {
		rs = append(rs, &kgo.Record{Topic: topic, Key: fmt.Appendf(nil, "k%d", i), Value: fmt.Appendf(nil, "v%d", i)})
	}
	if err := cl.ProduceSync(context.Background(), rs...).FirstErr(); err != nil {
		return err
	}
	fmt.Println("produced", len(rs))
	return nil
}

// owned is what this member has: kgo tells of changes, the protocol wants the whole.
type owned struct {
	sync.Mutex
	partitions []int32
}

func (o *owned) change(topic string, add bool) func(context.Context, *kgo.Client, map[string][]int32) {
	return func(_ context.Context, _ *kgo.Client, ps map[string][]int32) {
		o.Lock()
		defer o.Unlock()
		for _, p := range ps[topic] {
			o.partitions = slices.DeleteFunc(o.partitions, func(q int32) bool { return q == p })
			if add {
				o.partitions = append(o.partitions, p)
			}
		}
		slices.Sort(o.partitions)
		fmt.Println(strings.TrimSpace("assigned " + strings.Join(strings.Fields(strings.Trim(fmt.Sprint(o.partitions), "[]")), ",")))
	}
}

func consume(bootstrap, topic, group, flavour string) error {
	var mine owned
	balancer := kgo.RangeBalancer()
	opts := options(bootstrap)
	if flavour == "cooperative" {
		balancer = kgo.CooperativeStickyBalancer()
	}
	if instance, ok := strings.CutPrefix(flavour, "static:"); ok {
		opts = append(opts, kgo.InstanceID(instance), kgo.ConnIdleTimeout(time.Second))
	}
	cl, err := kgo.NewClient(append(opts,
		kgo.ConsumerGroup(group), kgo.ConsumeTopics(topic), kgo.Balancers(balancer), kgo.DisableAutoCommit(), kgo.BlockRebalanceOnPoll(),
		kgo.FetchMaxWait(time.Second), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.SessionTimeout(6*time.Second), kgo.HeartbeatInterval(500*time.Millisecond),
		kgo.OnPartitionsAssigned(mine.change(topic, true)), kgo.OnPartitionsRevoked(mine.change(topic, false)), kgo.OnPartitionsLost(mine.change(topic, false)),
	)...)
	if err != nil {
		return err
	}
	ctx, leave := context.WithCancel(context.Background())
	go commands(cl, leave)
	for ctx.Err() == nil {
		fetches := cl.PollFetches(ctx)
		fetches.EachError(func(t string, p int32, err error) {
			if !errors.Is(err, context.Canceled) {
				log.Printf("fetch %s/%d: %v", t, p, err)
			}
		})
		fetches.EachRecord(func(r *kgo.Record) { fmt.Println("got", r.Partition, r.Offset, string(r.Key)) })
		if fetches.NumRecords() > 0 {
			if err := cl.CommitUncommittedOffsets(context.Background()); err != nil {
				log.Print("commit: ", err)
			} else {
				fmt.Println("committed")
			}
		}
		cl.AllowRebalance()
	}
	cl.CloseAllowingRebalance()
	fmt.Println("left")
	return nil
}

// commands: "show" prints member id and generation, any other line ends the member.
func commands(cl *kgo.Client, leave func()) {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() && in.Text() == "show" {
		id, generation := cl.GroupMetadata()
		fmt.Println("member", id, generation)
	}
	leave()
}

// transact does a transaction without offsets, an aborted one, then one with offsets, which must fail for this producer alone.
func transact(bootstrap, topic, group string) error {
	sess, err := kgo.NewGroupTransactSession(append(options(bootstrap), kgo.TransactionalID("franz-"+topic), kgo.ConsumerGroup(group),
		kgo.ConsumeTopics(topic), kgo.FetchIsolationLevel(kgo.ReadCommitted()), kgo.DefaultProduceTopic(topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))...)
	if err != nil {
		return err
	}
	defer sess.Close()
	cl, err := kgo.NewClient(append(options(bootstrap), kgo.TransactionalID("franz-plain-"+topic), kgo.DefaultProduceTopic(topic))...)
	if err != nil {
		return err
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, try := range []kgo.TransactionEndTry{kgo.TryCommit, kgo.TryAbort} {
		end := map[kgo.TransactionEndTry]string{kgo.TryCommit: "commit", kgo.TryAbort: "abort"}[try]
		if err := cl.BeginTransaction(); err != nil {
			return err
		}
		for i := range 10 {
			if err := cl.ProduceSync(ctx, kgo.KeyStringRecord(end+strconv.Itoa(i), end)).FirstErr(); err != nil {
				return err
			}
		}
		if err := cl.EndTransaction(ctx, try); err != nil {
			return err
		}
		fmt.Println(end, "ended")
	}
	for n := 0; n < 10; {
		fetches := sess.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return err
		}
		fetches.EachRecord(func(r *kgo.Record) { n++; fmt.Println("got", r.Partition, r.Offset, string(r.Key)) })
	}
	if err := sess.Begin(); err != nil {
		return err
	}
	sess.Produce(ctx, kgo.KeyStringRecord("lost", "lost"), nil)
	committed, err := sess.End(ctx, kgo.TryCommit)
	fmt.Println("offsets", committed, err)
	return nil
}
