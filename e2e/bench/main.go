// Command bench measures what the project promises in figures, on this machine: a real Kafka, a sidecar in front of it,
// the same load on both. Ratios are of one run; absolute figures depend on the machine.
//
//	go run ./e2e/bench                 all of it, about three minutes
//	go run ./e2e/bench -only commit    one part: latency, data, commit, idle, start
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// bench is the two addresses to compare and the table that comes of it.
type bench struct {
	kafka   *lab.Kafka
	sidecar *lab.Sidecar
	seconds time.Duration // of each measurement
}

var parts = []struct {
	name string
	run  func(*bench) error
}{
	{"idle", (*bench).idle},
	{"start", (*bench).start},
	{"latency", (*bench).latency},
	{"commit", (*bench).commit},
	{"data", (*bench).data},
}

func main() {
	log.SetFlags(0)
	only := flag.String("only", "", "the one part to run: idle, start, latency, commit, data")
	seconds := flag.Duration("time", 5*time.Second, "how long each measurement lasts")
	flag.Parse()
	err := run(*only, *seconds)
	lab.Cleanup()
	if err != nil {
		log.Println("bench:", err)
		os.Exit(1)
	}
}

func run(only string, seconds time.Duration) error {
	dir, err := lab.TempDir("kafka")
	if err != nil {
		return err
	}
	k, err := lab.StartKafka(lab.KafkaConfig{Dir: dir, Tuned: true, Heap: "1g", Props: map[string]string{"log.segment.bytes": "1073741824"}})
	if err != nil {
		return err
	}
	defer k.Stop()
	data, err := lab.TempDir("data")
	if err != nil {
		return err
	}
	b := &bench{kafka: k, seconds: seconds, sidecar: &lab.Sidecar{Upstream: k.Addrs(), Dir: data,
		Args: []string{"--group-initial-rebalance-delay", "0s"}}}
	if err := b.sidecar.Up(); err != nil {
		return err
	}
	defer func() { b.sidecar.Kill() }()
	fmt.Printf("%-44s %14s %14s %16s  %s\n", "", "Kafka", "sidecar", "result", "promised")
	for _, p := range parts {
		if only != "" && p.name != only {
			continue
		}
		if err := p.run(b); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// row prints one line of the table.
func row(what, direct, proxied, result, promised string) {
	fmt.Printf("%-44s %14s %14s %16s  %s\n", what, direct, proxied, result, promised)
}

func quantile(all []time.Duration, q float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[min(int(q*float64(len(all))), len(all)-1)]
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

// idle: the resident set of a sidecar that has nothing to do.
func (b *bench) idle() error {
	time.Sleep(b.seconds)
	mb, err := residentMB(b.sidecar.Cmd.Process.Pid)
	if err != nil {
		return err
	}
	row("resident set, idle", "", fmt.Sprintf("%.1f MB", mb), "", "≤ 40 MB")
	return nil
}

// start: from the start of the process to its line "ready", with an empty store.
func (b *bench) start() error {
	var all []time.Duration
	for range 20 {
		dir, err := lab.TempDir("start")
		if err != nil {
			return err
		}
		s := &lab.Sidecar{Upstream: b.kafka.Addrs(), Dir: dir}
		if s.Port, err = lab.Ports(8); err != nil {
			return err
		}
		began := time.Now()
		if err := s.Up(); err != nil {
			return err
		}
		all = append(all, time.Since(began))
		s.Kill()
	}
	row("ready with an empty store, worst of 20 starts", "", quantile(all, 1).Round(time.Millisecond).String(),
		"p50 "+quantile(all, 0.5).Round(time.Millisecond).String(), "≤ 300 ms")
	return nil
}

func mbs(bytes int64, d time.Duration) float64 { return float64(bytes) / 1e6 / d.Seconds() }

func percent(x float64) string { return strings.TrimSpace(fmt.Sprintf("%.1f %%", 100*x)) }
