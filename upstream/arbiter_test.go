package upstream_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// decide asks with a deadline of some seconds.
func (w *world) decide(proposal string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return w.client.Decide(ctx, "births", proposal)
}

func TestTheFirstProposalWins(t *testing.T) {
	bubble(t, nil, []string{"127.0.0.1:9092"}, func(w *world) {
		w.with(3)
		const candidates = 5
		winners := make(chan string, candidates)
		for i := range candidates {
			go func() {
				winner, err := w.decide(fmt.Sprint("node-", i))
				if err != nil {
					t.Error(err)
				}
				winners <- winner
			}()
		}
		first := <-winners
		for range candidates - 1 {
			if other := <-winners; other != first {
				t.Errorf("%s won, and %s", first, other)
			}
		}
		if later, err := w.decide("latecomer"); err != nil || later != first || !strings.HasPrefix(first, "node-") {
			t.Errorf("%s %v, not %s", later, err, first)
		}
	})
}

func TestATopicOfManyPartitionsDecidesNothing(t *testing.T) {
	bubble(t, nil, []string{"127.0.0.1:9092"}, func(w *world) {
		w.with(1, kfake.SeedTopics(2, "births"))
		if winner, err := w.decide("me"); err == nil || !strings.Contains(err.Error(), "2 partitions") {
			t.Errorf("%s %v", winner, err)
		}
	})
}

// The decision must not change when retention has eaten it.
func TestALostDecisionIsNotTakenAnew(t *testing.T) {
	bubble(t, nil, []string{"127.0.0.1:9092"}, func(w *world) {
		w.with(1)
		if _, err := w.decide("first"); err != nil {
			t.Fatal(err)
		}
		w.kafka.ControlKey(int16(kmsg.ListOffsets), func(req kmsg.Request) (kmsg.Response, error, bool) {
			w.kafka.KeepControl()
			resp := req.ResponseKind().(*kmsg.ListOffsetsResponse)
			p := kmsg.NewListOffsetsResponseTopicPartition()
			p.Offset = 1
			resp.Topics = []kmsg.ListOffsetsResponseTopic{{Topic: "births", Partitions: []kmsg.ListOffsetsResponseTopicPartition{p}}}
			return resp, nil, true
		})
		if winner, err := w.decide("second"); err == nil || !strings.Contains(err.Error(), "has been deleted") {
			t.Errorf("%s %v", winner, err)
		}
	})
}

// Without the right to create topics one that is there is used, and the error for a missing one says how to create it.
func TestAnOperatorMayCreateTheTopic(t *testing.T) {
	for _, there := range []bool{true, false} {
		bubble(t, nil, []string{"127.0.0.1:9092"}, func(w *world) {
			opts := []kfake.Opt{}
			if there {
				opts = append(opts, kfake.SeedTopics(1, "births"))
			}
			w.with(1, opts...)
			w.kafka.ControlKey(int16(kmsg.CreateTopics), func(req kmsg.Request) (kmsg.Response, error, bool) {
				resp := req.ResponseKind().(*kmsg.CreateTopicsResponse)
				denied := kmsg.NewCreateTopicsResponseTopic()
				denied.Topic, denied.ErrorCode = "births", kerr.TopicAuthorizationFailed.Code
				resp.Topics = append(resp.Topics, denied)
				return resp, nil, true
			})
			winner, err := w.decide("me")
			if there && (winner != "me" || err != nil) || !there && (err == nil || !strings.Contains(err.Error(), "retention.ms")) {
				t.Errorf("there: %v: %s %v", there, winner, err)
			}
		})
	}
}

func TestAnArbiterThatIsDownIsAnError(t *testing.T) {
	dial := func(context.Context, string, string) (net.Conn, error) { return nil, fmt.Errorf("nobody there") }
	bubble(t, dial, []string{"127.0.0.1:9092"}, func(w *world) {
		if winner, err := w.decide("me"); err == nil || winner != "" {
			t.Errorf("%s %v", winner, err)
		}
	})
}
