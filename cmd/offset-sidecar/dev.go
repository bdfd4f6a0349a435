package main

import (
	"fmt"
	"path/filepath"

	"github.com/urfave/cli/v2"
)

// dev is the verb: a sidecar in front of an embedded Kafka.
func (p *program) dev(c *cli.Context) error {
	config, err := p.config(c, "dev")
	if err != nil {
		return err
	}
	if err := config.validate(false); err != nil {
		return usageError{err}
	}
	logger, kafkaDir := p.logger(config), ""
	if config.DataDir != "" { // one directory for both, each with a room of its own in it
		kafkaDir = filepath.Join(config.DataDir, "kafka")
		config.DataDir = filepath.Join(config.DataDir, "offsets")
	}
	kafka, err := startKafka(kafkaDir, kafkaDataLimit, logger)
	if err != nil {
		return err
	}
	defer kafka.Close()
	config.Upstream.Seeds = kafka.addrs()
	q := *p
	q.started = func(s *Sidecar) {
		fmt.Fprintf(p.stdout, firstThings, s.Addr(), keptWhere(kafkaDir))
		if p.started != nil {
			p.started(s)
		}
	}
	return q.serve(config, logger)
}

func keptWhere(kafkaDir string) string {
	if kafkaDir == "" {
		return "Everything is in memory and gone when you stop this with Ctrl-C; --data-dir DIR keeps it."
	}
	return "Topics and offsets are kept in " + filepath.Dir(kafkaDir) + "."
}

// firstThings is what dev prints: the address, and something to try with whatever is at hand.
const firstThings = `
A Kafka for trying things out is ready:

    bootstrap.servers = %[1]s

Topics are created when first used. Write some lines, read them in a group, stop, and read on where you were:

  kcat
    seq 1 5 | kcat -b %[1]s -P -t hello
    kcat -b %[1]s -G my-group -X auto.offset.reset=earliest hello

  Kafka's own tools
    seq 1 5 | kafka-console-producer.sh --bootstrap-server %[1]s --topic hello
    kafka-console-consumer.sh --bootstrap-server %[1]s --topic hello --group my-group --from-beginning
    kafka-consumer-groups.sh --bootstrap-server %[1]s --describe --group my-group

  Go (github.com/twmb/franz-go/pkg/kgo)
    client, err := kgo.NewClient(kgo.SeedBrokers("%[1]s"), kgo.ConsumerGroup("my-group"), kgo.ConsumeTopics("hello"))

%[2]s
`
