package store

import (
	"fmt"
	"testing"
)

// BenchmarkLatest loads a store of many keys, as a start does.
func BenchmarkLatest(b *testing.B) {
	s, err := Open(Options{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	const keys = 200_000
	index := uint64(0)
	for n := 0; n < keys; {
		var records []Record
		for range 500 {
			records = append(records, rec(int32(n%50), fmt.Sprintf("key of a group and its topic %08d", n), fmt.Sprintf("value-%054d", n)))
			n++
		}
		index++
		if err := s.Append(index, 1, 1, index+1, records); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Flush(allOfTail); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		n := 0
		if err := s.Latest(func(Record) error { n++; return nil }); err != nil || n != keys {
			b.Fatal(n, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/keys, "ns/key")
}
