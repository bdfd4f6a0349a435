// Command sarama is sarama behind the drivers' line protocol (see e2e/doc.go). It shares one connection to each broker
// between fetches and group calls.
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
	"sync/atomic"
	"time"

	"github.com/IBM/sarama"
)

func main() {
	log.SetFlags(log.Lmicroseconds)
	sarama.Logger = log.New(os.Stderr, "sarama ", log.Lmicroseconds)
	verb, bootstrap, topic, rest := os.Args[1], strings.Split(os.Args[2], ","), os.Args[3], os.Args[4:]
	config := sarama.NewConfig()
	config.Metadata.RefreshFrequency = 5 * time.Second
	config.Metadata.Retry.Max = 60
	var err error
	switch verb {
	case "produce":
		err = produce(config, bootstrap, topic, rest[0], rest[1])
	case "consume":
		err = consume(config, bootstrap, topic, rest[0], rest[1])
	default:
		err = fmt.Errorf("unknown verb %q", verb)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func produce(config *sarama.Config, bootstrap []string, topic, from, to string) error {
	config.Producer.Return.Successes = true
	config.Producer.RequiredAcks = sarama.WaitForAll
	config.Producer.Retry.Max = 100 // a broker that comes back may not lead its partitions yet
	p, err := sarama.NewSyncProducer(bootstrap, config)
	if err != nil {
		return err
	}
	first, _ := strconv.Atoi(from)
	last, _ := strconv.Atoi(to)
	var ms []*sarama.ProducerMessage
	for i := first; i < last; i++ {
		ms = append(ms, &sarama.ProducerMessage{Topic: topic, Key: sarama.StringEncoder("k" + strconv.Itoa(i)), Value: sarama.StringEncoder("v" + strconv.Itoa(i))})
	}
	if err := p.SendMessages(ms); err != nil {
		return err
	}
	fmt.Println("produced", len(ms))
	return p.Close()
}

func consume(config *sarama.Config, bootstrap []string, topic, group, flavour string) error {
	config.Consumer.Offsets.Initial = sarama.OffsetOldest
	config.Consumer.Offsets.AutoCommit.Enable = false
	config.Consumer.Return.Errors = true
	config.Consumer.Group.Session.Timeout = 6 * time.Second
	config.Consumer.Group.Heartbeat.Interval = 500 * time.Millisecond
	config.Consumer.Group.Rebalance.Retry.Max = 60
	config.Consumer.Group.Rebalance.Retry.Backoff = 500 * time.Millisecond
	if instance, ok := strings.CutPrefix(flavour, "static:"); ok {
		config.Consumer.Group.InstanceId = instance
	}
	g, err := sarama.NewConsumerGroup(bootstrap, group, config)
	if err != nil {
		return err
	}
	go func() {
		for err := range g.Errors() {
			log.Print("error: ", err)
		}
	}()
	ctx, leave := context.WithCancel(context.Background())
	m := &member{topic: topic}
	go m.commands(leave)
	for ctx.Err() == nil {
		err := g.Consume(ctx, []string{topic}, m)
		if errors.Is(err, sarama.ErrClosedConsumerGroup) {
			break
		}
		if err != nil {
			log.Print("consume: ", err)
			time.Sleep(200 * time.Millisecond) // sarama leaves the pause between two attempts to its user
		}
	}
	if err := g.Close(); err != nil {
		return err
	}
	fmt.Println("left")
	return nil
}

type member struct {
	topic   string
	session atomic.Value // of sarama.ConsumerGroupSession
}

func (m *member) Setup(s sarama.ConsumerGroupSession) error {
	m.session.Store(s)
	ps := s.Claims()[m.topic]
	slices.Sort(ps)
	fmt.Println(strings.TrimSpace("assigned " + strings.Join(strings.Fields(strings.Trim(fmt.Sprint(ps), "[]")), ",")))
	return nil
}

func (m *member) Cleanup(sarama.ConsumerGroupSession) error { return nil }

func (m *member) ConsumeClaim(s sarama.ConsumerGroupSession, claim sarama.ConsumerGroupClaim) error {
	// Commit says nothing of its success and gives up after three attempts; what is still not committed then goes with
	// the next one. It sends nothing when there is nothing left.
	again := time.NewTicker(time.Second)
	defer again.Stop()
	for {
		select {
		case <-again.C:
			s.Commit()
		case r, ok := <-claim.Messages():
			if !ok {
				return nil
			}
			fmt.Println("got", r.Partition, r.Offset, string(r.Key))
			s.MarkMessage(r, "")
			if len(claim.Messages()) > 0 {
				continue // a commit waits for the fetch before it on the same connection: one for each batch
			}
			s.Commit()
			fmt.Println("committed")
		case <-s.Context().Done():
			return nil
		}
	}
}

// commands: "show" prints member id and generation, any other line ends the member.
func (m *member) commands(leave func()) {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() && in.Text() == "show" {
		if s, ok := m.session.Load().(sarama.ConsumerGroupSession); ok {
			fmt.Println("member", s.MemberID(), s.GenerationID())
		}
	}
	leave()
}
