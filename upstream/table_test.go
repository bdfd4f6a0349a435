package upstream

import (
	"fmt"
	"testing"
	"time"
)

func TestTableIsBoundedAndDropsTheOldest(t *testing.T) {
	var c Client
	start := time.Now()
	for i := range maxTopics + 1 {
		name := fmt.Sprint("topic-", i)
		c.topics.put(name, [16]byte{byte(i), byte(i >> 8), byte(i >> 16), 1}, 1, start.Add(time.Duration(i)))
		if i == 5 {
			c.Topic("topic-0") // used since, although the oldest
		}
	}
	if n := len(c.topics.byName); n > maxTopics || n < maxTopics*9/10 || n != len(c.topics.byID) {
		t.Errorf("%d names, %d ids", n, len(c.topics.byID))
	}
	for name, want := range map[string]bool{"topic-0": true, "topic-1": false, fmt.Sprint("topic-", maxTopics): true} {
		if _, _, known := c.Topic(name); known != want {
			t.Errorf("%s: known %v", name, known)
		}
	}
}

func TestLookingUpATopicAllocatesNothing(t *testing.T) {
	var c Client
	c.topics.put("orders", [16]byte{1}, 1, time.Now())
	if n := testing.AllocsPerRun(100, func() {
		id, _, _ := c.Topic("orders")
		c.TopicName(id)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
