package replicate

import "github.com/offset-sidecar/offset-sidecar/replicate/store"

// Record is one record of the compacted log. A nil Value is a tombstone. Partition -1 is private: it takes no offsets.
type Record = store.Record

// Limits of an entry. A single record larger than EntryBytes may go up to MaxRecordBytes in an entry of its own. An
// entry beyond them is not appended: it Failed with ErrEntryTooLarge.
const (
	EntryBytes      = 128 << 10
	MaxRecordBytes  = 900 << 10
	MaxKeyBytes     = store.MaxKeyBytes
	MaxRecords      = store.MaxEntryRecords
	EntriesInFlight = 2
)

// Entry is what one append to raft's log carries. It counts only in the term it was computed in, and only if its
// sequence number is the next of that term (the first is 1); elsewhere every replica ignores it.
type Entry struct {
	Term, Sequence uint64
	Records        []Record
}

// EventKind says what an Event is.
type EventKind uint8

const (
	// Reset: what follows builds on the records that Node.Latest gives now. The first event of a Node.
	Reset EventKind = iota + 1
	// Applied: the entry is replicated, and its records hold.
	Applied
	// Ignored: the entry was of another term or out of sequence; no replica has applied it.
	Ignored
	// Failed: the entry offered for (Term, Sequence) was not appended, or it is not known whether it was; Err says why.
	Failed
	// Active: this replica is raft's leader in Term, and every entry before has been delivered.
	Active
	// Inactive: it is no longer; no entry of Term offered from here on will be appended.
	Inactive
	// Stored: every in-sync replica has now stored whatever of Term is at raft's Index or before. It may come before the
	// Applied of that index.
	Stored
)

// Event is something that happened to the log, delivered in its order on Node.Events.
type Event struct {
	Kind           EventKind
	Term, Sequence uint64
	Index          uint64 // raft's index, for Applied, Ignored and Stored
	Records        []Record
	// Stored on Applied: every replica whose copy is asked for has the entry already. If not, a Stored event follows.
	Stored bool
	Err    error
}
