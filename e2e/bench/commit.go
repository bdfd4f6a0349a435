package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

const connections = 64

// commit: 64 connections, each committing one offset of a group of its own as fast as it is acknowledged. Kafka does
// not sync its log, the sidecar does.
func (b *bench) commit() error {
	if err := b.topic("committed", 1); err != nil {
		return err
	}
	var rate [2]float64
	var p50, p99 [2]time.Duration
	var cost float64
	for i, addr := range []string{b.kafka.Addrs(), b.sidecar.Addr()} {
		pid := b.sidecar.Cmd.Process.Pid
		if i == 0 {
			pid = b.kafka.Brokers[0].Cmd.Process.Pid
		}
		if _, err := commits(addr, b.seconds); err != nil { // warms up: Kafka's compiler, both sides' groups
			return err
		}
		before, err := cpu(pid)
		if err != nil {
			return err
		}
		took, err := commits(addr, b.seconds)
		if err != nil {
			return err
		}
		after, err := cpu(pid)
		if err != nil {
			return err
		}
		rate[i] = float64(len(took)) / b.seconds.Seconds()
		p50[i], p99[i] = quantile(took, 0.5), quantile(took, 0.99)
		cost = float64((after - before).Microseconds()) / float64(len(took))
	}
	row("OffsetCommit, 64 connections", fmt.Sprintf("%.0f/s", rate[0]), fmt.Sprintf("%.0f/s", rate[1]), fmt.Sprintf("× %.2f", rate[1]/rate[0]), "≥ 1")
	row("OffsetCommit, p50", p50[0].String(), p50[1].String(), "", "")
	row("OffsetCommit, p99", p99[0].String(), p99[1].String(), "", "")
	row("sidecar's CPU per OffsetCommit", "", fmt.Sprintf("%.1f µs", cost), "", "")
	return nil
}

// commits commits for some time and gives how long each took.
func commits(addr string, d time.Duration) ([]time.Duration, error) {
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	for i := range connections {
		wg.Go(func() {
			took, err := committer(addr, fmt.Sprintf("bench-%d", i), end)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
			if err != nil {
				failed = err
			}
		})
	}
	wg.Wait()
	return all, failed
}

func committer(addr, group string, end time.Time) ([]time.Duration, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	if err := coordinatorReady(c, group); err != nil {
		return nil, err
	}
	req := kmsg.NewPtrOffsetCommitRequest()
	req.Version, req.Group, req.Generation = 7, group, -1
	t := kmsg.NewOffsetCommitRequestTopic()
	t.Topic = "committed"
	t.Partitions = append(t.Partitions, kmsg.NewOffsetCommitRequestTopicPartition())
	req.Topics = append(req.Topics, t)
	var took []time.Duration
	var frame, reply []byte
	for n := int64(0); time.Now().Before(end); n++ {
		req.Topics[0].Partitions[0].Offset = n
		began := time.Now()
		if frame, reply, err = exchange(c, req, frame, reply); err != nil {
			return took, err
		}
		took = append(took, time.Since(began))
		// The error code of its only partition is what a reply of this version ends with.
		if code := binary.BigEndian.Uint16(reply[len(reply)-2:]); code != 0 {
			return took, fmt.Errorf("OffsetCommit was answered with error %d", code)
		}
	}
	return took, nil
}

// coordinatorReady asks for the coordinator until there is one: a fresh Kafka has to create its topic first.
func coordinatorReady(c net.Conn, group string) error {
	req := kmsg.NewPtrOffsetFetchRequest()
	req.Version, req.Group = 3, group
	find := kmsg.NewPtrFindCoordinatorRequest()
	find.Version, find.CoordinatorKey = 1, group
	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, _, err := exchange(c, find, nil, nil); err != nil {
			return err
		}
		_, reply, err := exchange(c, req, nil, nil)
		if err != nil {
			return err
		}
		code := int16(binary.BigEndian.Uint16(reply[len(reply)-2:]))
		if code == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no coordinator: error %d", code)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// exchange writes a request and reads its reply; both buffers are given back for the next one.
func exchange(c net.Conn, req kmsg.Request, frame, reply []byte) ([]byte, []byte, error) {
	frame = kmsg.NewRequestFormatter(kmsg.FormatterClientID("bench")).AppendRequest(frame[:0], req, 1)
	if _, err := c.Write(frame); err != nil {
		return frame, reply, err
	}
	var size [4]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return frame, reply, err
	}
	n := int(binary.BigEndian.Uint32(size[:]))
	if cap(reply) < n {
		reply = make([]byte, n)
	}
	reply = reply[:n]
	_, err := io.ReadFull(c, reply)
	return frame, reply, err
}
