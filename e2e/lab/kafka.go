package lab

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Newest and Oldest are the Kafka versions that the tests run; the oldest needs ZooKeeper.
const (
	Newest = "4.3.0"
	Oldest = "2.8.2"
)

// KafkaConfig is one Kafka cluster on loopback.
type KafkaConfig struct {
	Version string            // "" is Newest
	Brokers int               // 0 is 1; their ids count from 1
	Dir     string            // of its data and logs
	Props   map[string]string // more broker properties
	Heap    string            // "" is 512m, or 320m each for several
	Tuned   bool              // with a server's compiler and collector: for measurements
}

// Kafka is a running cluster. Its brokers may be stopped and started one by one.
type Kafka struct {
	Brokers []*Broker

	config KafkaConfig
	paths  Paths
	base   int
	zk     *Process
}

// Broker is one of them; Process is nil before its first start.
type Broker struct {
	ID   int
	Port int
	*Process

	kafka *Kafka
}

// maxSpare is how many brokers can be added to a cluster: their ports are set aside.
const maxSpare = 1

// StartKafka starts the brokers and waits until they know each other.
func StartKafka(c KafkaConfig) (*Kafka, error) {
	paths, err := Setup()
	if err != nil {
		return nil, err
	}
	if c.Version == "" {
		c.Version = Newest
	}
	c.Brokers = max(c.Brokers, 1)
	if c.Heap == "" && c.Brokers > 1 {
		c.Heap = "320m"
	} else if c.Heap == "" {
		c.Heap = "512m"
	}
	base, err := Ports(2 * (c.Brokers + maxSpare))
	if err != nil {
		return nil, err
	}
	k := &Kafka{config: c, paths: paths, base: base}
	if c.Version == Oldest {
		if err := k.startZooKeeper(); err != nil {
			return nil, err
		}
	}
	for id := 1; id <= c.Brokers; id++ {
		b := k.broker(id)
		k.Brokers = append(k.Brokers, b)
		if err := b.Start(); err != nil {
			k.Stop()
			return nil, err
		}
	}
	if err := k.Ready(90 * time.Second); err != nil {
		err = fmt.Errorf("starting Kafka: %w\n%s", err, k.Brokers[0].Tail(40))
		k.Stop()
		return nil, err
	}
	return k, nil
}

func (k *Kafka) broker(id int) *Broker {
	return &Broker{ID: id, Port: k.base + 2*(id-1), kafka: k}
}

// Add starts one more broker and waits until the others know it.
func (k *Kafka) Add() (*Broker, error) {
	b := k.broker(len(k.Brokers) + 1)
	if b.ID > k.config.Brokers+maxSpare {
		return nil, fmt.Errorf("no ports are set aside for broker %d", b.ID)
	}
	k.Brokers = append(k.Brokers, b)
	if err := b.Start(); err != nil {
		return nil, err
	}
	return b, k.Ready(60 * time.Second)
}

// Addr is the broker's own address.
func (b *Broker) Addr() string { return fmt.Sprintf("127.0.0.1:%d", b.Port) }

// Addrs is the cluster's bootstrap list.
func (k *Kafka) Addrs() string {
	var all []string
	for _, b := range k.Brokers {
		all = append(all, b.Addr())
	}
	return strings.Join(all, ",")
}

// Start starts the broker, or starts it again on the same port and directory.
func (b *Broker) Start() error {
	k := b.kafka
	dir := filepath.Join(k.config.Dir, fmt.Sprint(b.ID))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	file := filepath.Join(k.config.Dir, fmt.Sprintf("%d.properties", b.ID))
	if err := os.WriteFile(file, k.properties(b, dir), 0o644); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "meta.properties")); err != nil && k.config.Version != Oldest {
		args := k.paths.Java(k.config.Version, "128m", "kafka.tools.StorageTool", "format", "-t", "b2Zmc2V0LXNpZGVjYXItZQ", "-c", file)
		if b.ID > k.config.Brokers { // one more broker beside the controllers
			args = append(args, "--no-initial-controllers")
		}
		if _, err := Run(time.Minute, nil, "java", args...); err != nil {
			return err
		}
	}
	args := k.paths.Java(k.config.Version, k.config.Heap, "kafka.Kafka", file)
	if k.config.Tuned {
		args = k.paths.java(k.config.Version, k.config.Heap, []string{"-XX:+UseG1GC"}, []string{"kafka.Kafka", file})
	}
	var err error
	b.Process, err = StartProcess(fmt.Sprintf("kafka-%d", b.ID), nil, "java", args...)
	return err
}

func (k *Kafka) properties(b *Broker, dir string) []byte {
	rf := min(k.config.Brokers, 3)
	p := map[string]string{
		"listeners":                                "PLAINTEXT://" + b.Addr(),
		"log.dirs":                                 dir,
		"num.partitions":                           "4",
		"default.replication.factor":               fmt.Sprint(rf),
		"offsets.topic.replication.factor":         fmt.Sprint(rf),
		"offsets.topic.num.partitions":             "5",
		"transaction.state.log.replication.factor": fmt.Sprint(rf),
		"transaction.state.log.num.partitions":     "5",
		"transaction.state.log.min.isr":            fmt.Sprint(min(rf, 2)),
		"group.initial.rebalance.delay.ms":         "0",
		"auto.create.topics.enable":                "false",
		"log.segment.bytes":                        "67108864",
	}
	if k.config.Version == Oldest {
		p["broker.id"] = fmt.Sprint(b.ID)
		p["zookeeper.connect"] = fmt.Sprintf("127.0.0.1:%d", k.base+1)
		p["zookeeper.session.timeout.ms"] = "2000"
	} else {
		var voters []string
		for id := 1; id <= k.config.Brokers; id++ {
			voters = append(voters, fmt.Sprintf("%d@127.0.0.1:%d", id, k.base+2*(id-1)+1))
		}
		p["node.id"] = fmt.Sprint(b.ID)
		p["process.roles"] = "broker"
		if b.ID <= k.config.Brokers {
			p["process.roles"] = "broker,controller"
			p["listeners"] += fmt.Sprintf(",CONTROLLER://127.0.0.1:%d", b.Port+1)
		}
		p["advertised.listeners"] = "PLAINTEXT://" + b.Addr()
		p["controller.quorum.voters"] = strings.Join(voters, ",")
		p["controller.listener.names"] = "CONTROLLER"
		p["listener.security.protocol.map"] = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT"
		p["share.coordinator.state.topic.replication.factor"] = fmt.Sprint(rf)
		p["share.coordinator.state.topic.min.isr"] = fmt.Sprint(min(rf, 2))
		// A dead broker's partitions move after this time: the default, 9 s, only makes tests longer.
		p["broker.session.timeout.ms"] = "3000"
		p["broker.heartbeat.interval.ms"] = "500"
	}
	maps.Copy(p, k.config.Props)
	var out bytes.Buffer
	for _, key := range slices.Sorted(maps.Keys(p)) {
		fmt.Fprintf(&out, "%s=%s\n", key, p[key])
	}
	return out.Bytes()
}

func (k *Kafka) startZooKeeper() error {
	file := filepath.Join(k.config.Dir, "zookeeper.cfg")
	text := fmt.Sprintf("tickTime=500\ndataDir=%s\nclientPort=%d\nclientPortAddress=127.0.0.1\nadmin.enableServer=false\nmaxClientCnxns=0\n",
		filepath.Join(k.config.Dir, "zookeeper"), k.base+1)
	if err := os.MkdirAll(k.config.Dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	var err error
	k.zk, err = StartProcess("zookeeper", nil, "java",
		k.paths.Java(k.config.Version, "128m", "org.apache.zookeeper.server.quorum.QuorumPeerMain", file)...)
	return err
}

// Ready waits until every broker answers and names all of them.
func (k *Kafka) Ready(within time.Duration) error {
	return Eventually(within, func() error {
		for _, b := range k.Brokers {
			if !b.Alive() {
				return fmt.Errorf("broker %d has ended", b.ID)
			}
			n, err := known(b.Addr())
			if err != nil {
				return err
			}
			if n != len(k.Brokers) {
				return fmt.Errorf("broker %d knows %d brokers of %d", b.ID, n, len(k.Brokers))
			}
		}
		return nil
	})
}

// Restore starts the brokers that do not run, and waits as Ready does. A broker that finds its own ephemeral node in
// ZooKeeper, its former self's, ends again: it is started until it stays.
func (k *Kafka) Restore(within time.Duration) error {
	return Eventually(within, func() error {
		for _, b := range k.Brokers {
			if b.Alive() {
				continue
			}
			if err := b.Start(); err != nil {
				return err
			}
		}
		return k.Ready(time.Second)
	})
}

// known asks one address how many brokers there are.
func known(addr string) (int, error) {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return 0, err
	}
	_ = c.Close()
	cl, err := kgo.NewClient(kgo.SeedBrokers(addr), kgo.RetryTimeout(2*time.Second), kgo.RequestRetries(0))
	if err != nil {
		return 0, err
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	req := kmsg.NewPtrMetadataRequest()
	req.Topics = []kmsg.MetadataRequestTopic{}
	resp, err := cl.SeedBrokers()[0].Request(ctx, req)
	if err != nil {
		return 0, err
	}
	return len(resp.(*kmsg.MetadataResponse).Brokers), nil
}

// Stop ends all brokers at once: nothing of their data is needed afterwards.
func (k *Kafka) Stop() {
	for _, b := range k.Brokers {
		if b.Process != nil && b.Alive() {
			_ = b.Signal(syscall.SIGCONT) // one that is stopped
			b.Kill()
		}
	}
	if k.zk != nil {
		k.zk.Kill()
	}
	_ = os.RemoveAll(k.config.Dir)
}

// Remove kills a broker that Add started and waits until the others have forgotten it.
func (k *Kafka) Remove(b *Broker) error {
	b.Kill()
	k.Brokers = slices.DeleteFunc(k.Brokers, func(o *Broker) bool { return o == b })
	return k.Ready(60 * time.Second)
}
