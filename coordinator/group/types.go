package group

import (
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Record is one record of the compacted log: the newest one of a key holds. A nil Value is a tombstone.
// Partition is that of __consumer_offsets ([PartitionOf] the group), or PrivatePartition for key types above 1000.
type Record struct {
	Partition  int32
	Key, Value []byte
}

// PrivatePartition holds records that Kafka has no schema for; they are never shown to clients.
const PrivatePartition int32 = -1

// MaxRecord is the largest key plus value that may be replicated; a request that needs more is answered with Kafka's
// UNKNOWN_SERVER_ERROR (as its coordinator maps RecordTooLargeException) and changes nothing.
const MaxRecord = 900 << 10

// Session is a client connection, whichever sidecar it ends at (a UUID).
type Session [16]byte

// Client says who asks.
type Client struct {
	ID      string // the client id of the request header, "" if null
	Host    string // as Kafka shows it: "/127.0.0.1"
	Session Session
	Ordinal uint64 // of the request in its session, from 1
}

// Topics is what is known of the upstream's topics.
type Topics interface {
	// Topic gives a topic's id (zero if the upstream has none) and its number of partitions.
	Topic(name string) (id [16]byte, partitions int32, known bool)
	// TopicName gives the name of a topic id.
	TopicName(id [16]byte) (name string, known bool)
}

// Input is one request. All that the core must not find out by itself comes with it.
type Input struct {
	Call    uint64 // names the request in the replies, which may come later; not 0
	Request kmsg.Request
	Client  Client
	NewID   string // a random UUID in text form, for a member id that has to be made up
	Topics  Topics
	// AcceptUnknownTopics is set while the upstream cannot be asked: what cannot be verified is accepted.
	AcceptUnknownTopics bool

	remembered map[*group]map[[16]byte]string // names by topic id, of the groups' own offsets
}

// Reply answers the request named Call, now or long after its Step.
type Reply struct {
	Call     uint64
	Response kmsg.Response
	// Fence: the response asserts group state without having appended any; it is held until a read fence that began
	// after the request came. Every reply besides waits until all records stepped before it are replicated.
	Fence bool
	// Recent: a fence will do that began a little before the request came. The response is a heartbeat's that found
	// nothing to tell: what it asserts is all but true a moment later, and harmless.
	Recent bool
	// Again: the response acknowledges what the request yielded when it came before; that may still be on its way.
	Again bool
}

// Effects is what a Step, a Tick or an Activate wants done. The bytes of its records are the State's own: they may be
// kept, and are not to be changed.
type Effects struct {
	Records []Record // to replicate, in order; already applied to the State
	// Previous has for each of Records the record of that key before (a nil Value: there was none). Applying them in
	// reverse order undoes the Step's hard state.
	Previous []Record
	Replies  []Reply
}

// Config holds the limits and times of the group coordinator, named as Kafka's (group.*, offset*.*).
type Config struct {
	InitialRebalanceDelay time.Duration // group.initial.rebalance.delay.ms, 3 s
	MinSessionTimeout     time.Duration // group.min.session.timeout.ms, 6 s
	MaxSessionTimeout     time.Duration // group.max.session.timeout.ms, 30 min
	MaxSize               int           // group.max.size
	OffsetMetadataMaxSize int           // offset.metadata.max.bytes, 4096, in UTF-16 units
	OffsetsRetention      time.Duration // offsets.retention.minutes, 7 d
	OffsetsRetentionCheck time.Duration // offsets.retention.check.interval.ms, 600 s
	MaxSessions           int           // session records kept, 65,536
}
