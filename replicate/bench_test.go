package replicate

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"
)

// commitRecord has the size of an offset commit's.
func commitRecord(client, offset int) Record {
	key := fmt.Appendf(nil, "\x00\x01\x00\x08group-%02d\x00\x08topic-%02d\x00\x00\x00\x01", client%100, client%100)
	return Record{Partition: int32(client % 50), Key: key, Value: fmt.Appendf(nil, "value-%060d", offset)}
}

// BenchmarkAppend measures what a coordinator sees: clients in a closed loop, each with one record on its way, whose
// records are gathered into the next entry while others are in flight.
func BenchmarkAppend(b *testing.B) {
	for _, fsync := range []bool{true, false} {
		for _, clients := range []int{1, 64, 512} {
			b.Run(fmt.Sprintf("fsync=%t/clients=%d", fsync, clients), func(b *testing.B) {
				benchmarkAppend(b, fsync, clients)
			})
		}
	}
}

func benchmarkAppend(b *testing.B, fsync bool, clients int) {
	c := testConfig(b.TempDir())
	c.Fsync = fsync
	c.MinFree = 64 << 20
	n, err := Open(c)
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	var term uint64
	for e := range n.Events() {
		if e.Kind == Active {
			term = e.Term
			break
		}
	}
	var pending []Record
	var since []time.Time
	flying := map[uint64][]time.Time{}
	var took []time.Duration
	now := time.Now()
	for i := range clients {
		pending, since = append(pending, commitRecord(i, 0)), append(since, now)
	}
	cpu := cpuTime()
	b.ResetTimer()
	sequence, entries := uint64(1), 0
	for done := 0; done < b.N; {
		var offers chan<- Entry
		if len(pending) > 0 {
			offers = n.Entries()
		}
		select {
		case offers <- Entry{Term: term, Sequence: sequence, Records: pending}:
			flying[sequence] = since
			pending, since = nil, nil
			sequence++
		case e := <-n.Events():
			if e.Kind != Applied {
				b.Fatalf("%+v", e)
			}
			entries++
			now := time.Now()
			for _, at := range flying[e.Sequence] {
				took = append(took, now.Sub(at))
				done++
				pending, since = append(pending, commitRecord(done, done)), append(since, now)
			}
			delete(flying, e.Sequence)
		}
	}
	b.StopTimer()
	seconds := b.Elapsed().Seconds()
	slices.Sort(took)
	b.ReportMetric(float64(len(took))/seconds, "records/s")
	b.ReportMetric(float64(entries)/seconds, "entries/s")
	b.ReportMetric(float64((cpuTime()-cpu).Microseconds())/float64(len(took)), "cpu-µs/record")
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(0, "ns/op")
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
