package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	fillMB = 512 // of the topic that is consumed
	rounds = 5   // of each comparison: the median counts
)

func (b *bench) topic(name string, partitions int32) error {
	cl, err := kgo.NewClient(kgo.SeedBrokers(b.kafka.Addrs()))
	if err != nil {
		return err
	}
	defer cl.Close()
	_, err = kadm.NewClient(cl).CreateTopic(context.Background(), partitions, 1, nil, name)
	return err
}

// latency: one connection, one record of 100 bytes at a time, Kafka and the sidecar in turns.
func (b *bench) latency() error {
	if err := b.topic("latency", 1); err != nil {
		return err
	}
	record := &kgo.Record{Topic: "latency", Value: make([]byte, 100)}
	addrs := []string{b.kafka.Addrs(), b.sidecar.Addr()}
	var took [2][]time.Duration
	var clients [2]*kgo.Client
	for i, addr := range addrs {
		cl, err := kgo.NewClient(kgo.SeedBrokers(addr), kgo.ProducerLinger(0), kgo.RequiredAcks(kgo.LeaderAck()), kgo.DisableIdempotentWrite(),
			kgo.ProducerBatchCompression(kgo.NoCompression()))
		if err != nil {
			return err
		}
		defer cl.Close()
		clients[i] = cl
	}
	const warm, n = 1000, 8000
	for i := range warm + n {
		for j, cl := range clients {
			r := *record
			began := time.Now()
			if err := cl.ProduceSync(context.Background(), &r).FirstErr(); err != nil {
				return err
			}
			if i >= warm {
				took[j] = append(took[j], time.Since(began))
			}
		}
	}
	direct, proxied := quantile(took[0], 0.5), quantile(took[1], 0.5)
	row("produce of 100 bytes, p50", direct.String(), proxied.String(), "+"+(proxied-direct).String(), "≤ +60 µs")
	row("produce of 100 bytes, p99", quantile(took[0], 0.99).String(), quantile(took[1], 0.99).String(), "", "")
	return nil
}

// data: franz-go writes and reads large batches; the sidecar's processor time and the share that it spliced.
func (b *bench) data() error {
	if err := b.topic("bulk", 1); err != nil {
		return err
	}
	var write, read [2][]float64
	var writeCPU, readCPU, spliced []float64
	addrs := []string{b.kafka.Addrs(), b.sidecar.Addr()}
	for range rounds {
		for i, addr := range addrs {
			if err := b.topic(fmt.Sprintf("bulk-%d-%d", i, len(write[i])), 1); err != nil {
				return err
			}
			speed, cost, err := b.measured(func() (int64, error) { return produceMB(addr, fmt.Sprintf("bulk-%d-%d", i, len(write[i])), fillMB/2) })
			if err != nil {
				return err
			}
			write[i] = append(write[i], speed)
			if i == 1 {
				writeCPU = append(writeCPU, cost)
			}
		}
	}
	if _, err := produceMB(b.kafka.Addrs(), "bulk", fillMB); err != nil {
		return err
	}
	for range rounds {
		for i, addr := range addrs {
			splicedBefore, copiedBefore, err := b.moved()
			if err != nil {
				return err
			}
			speed, cost, err := b.measured(func() (int64, error) { return consumeMB(addr, "bulk", fillMB) })
			if err != nil {
				return err
			}
			read[i] = append(read[i], speed)
			if i == 1 {
				splicedAfter, copiedAfter, err := b.moved()
				if err != nil {
					return err
				}
				readCPU = append(readCPU, cost)
				through := splicedAfter - splicedBefore
				spliced = append(spliced, through/(through+copiedAfter-copiedBefore))
			}
		}
	}
	ratio := func(what string, all [2][]float64, promised string) {
		direct, proxied := median(all[0]), median(all[1])
		row(what, fmt.Sprintf("%.0f MB/s", direct), fmt.Sprintf("%.0f MB/s", proxied), fmt.Sprintf("× %.2f", proxied/direct), promised)
	}
	ratio("franz-go consumes", read, "≥ 0.80")
	ratio("franz-go produces", write, "≥ 0.95")
	row("sidecar's CPU per GB consumed", "", fmt.Sprintf("%.2f s", median(readCPU)), "", "≤ 0.5 s")
	row("sidecar's CPU per GB produced", "", fmt.Sprintf("%.2f s", median(writeCPU)), "", "≤ 0.5 s")
	row("bytes of 1 MiB fetches spliced", "", percent(median(spliced)), "", "≥ 95 %")
	return nil
}

// moved is how many bytes the sidecar has moved by splice, and through its memory.
func (b *bench) moved() (spliced, copied float64, err error) {
	if spliced, err = b.sidecar.Metric("offset_sidecar_spliced_bytes_total"); err != nil {
		return 0, 0, err
	}
	copied, err = b.sidecar.Metric("offset_sidecar_copied_bytes_total")
	return spliced, copied, err
}

// measured runs a transfer and gives its speed, in MB/s, and the sidecar's processor time, in seconds per GB.
func (b *bench) measured(transfer func() (int64, error)) (speed, cost float64, err error) {
	pid := b.sidecar.Cmd.Process.Pid
	before, err := cpu(pid)
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	bytes, err := transfer()
	if err != nil {
		return 0, 0, err
	}
	took := time.Since(began)
	after, err := cpu(pid)
	return mbs(bytes, took), (after - before).Seconds() / (float64(bytes) / 1e9), err
}

const valueSize = 10_000 // of the records of bulk transfers

func produceMB(addr, topic string, mb int64) (int64, error) {
	cl, err := kgo.NewClient(kgo.SeedBrokers(addr), kgo.DefaultProduceTopic(topic), kgo.ProducerBatchCompression(kgo.NoCompression()),
		kgo.ProducerBatchMaxBytes(1_000_000), kgo.MaxBufferedRecords(2000))
	if err != nil {
		return 0, err
	}
	defer cl.Close()
	value := make([]byte, valueSize)
	var failed error
	var sent int64
	for ; sent < mb*1e6; sent += valueSize {
		cl.Produce(context.Background(), &kgo.Record{Value: value}, func(_ *kgo.Record, err error) {
			if err != nil {
				failed = err // called by one goroutine at a time, before Flush returns
			}
		})
	}
	if err := cl.Flush(context.Background()); err != nil {
		return 0, err
	}
	return sent, failed
}

func consumeMB(addr, topic string, mb int64) (int64, error) {
	cl, err := kgo.NewClient(kgo.SeedBrokers(addr), kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.FetchMaxBytes(8<<20), kgo.FetchMaxPartitionBytes(1<<20))
	if err != nil {
		return 0, err
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var got int64
	for got < mb*1e6 {
		fetches := cl.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return got, errors.Join(err, fmt.Errorf("after %d MB", got/1e6))
		}
		got += int64(fetches.NumRecords()) * valueSize
	}
	return got, nil
}
