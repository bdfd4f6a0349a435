// Package store keeps what raft must not forget and what the group coordinator's records add up to, in one badger
// database. It is a ground room: it knows keys, values and raft's store interfaces, and nothing of groups or peers.
//
// The database has five key ranges (docs/formats.md gives their bytes):
//
//	stable        raft's term and vote                      Stable
//	raft log      entries, each with a CRC32C               RaftLog
//	compacted log blocks of records by partition, offset    Append, Read
//	latest        the newest record of each key             Latest
//	local         never replicated: node id, ports, caches  Local
//
// # What is promised
//
// RaftLog.StoreLogs returns when its entries are on disk (Fsync false: in the page cache, which survives kill -9).
// One synced transaction per call is the only fsync of a commit: applied records stay in memory, in the tail, and the
// keeper flushes them to the compacted log every 5 s or 8 MiB, for a snapshot and on Close. A flush is a row of
// transactions of whole entries, and each moves `applied` (raft index and term, the next entry expected, each
// partition's next offset, the configuration) together with the records. So there is no half-flushed state: what a
// crash cut off is replayed from raft's log, and gets the same offsets again. Of a large tail a transaction keeps the
// newest record per key alone: the rest would be compacted away within seconds.
//
// `applied` is also the snapshot. Taking one flushes the tail and writes nothing else; Snapshots.Open streams the
// compacted log out of the read transaction its meta came from; Restore replaces everything by such a stream.
//
// Offsets are sequential from 0 in each partition, in the order of Append, and identical on every replica. Partition
// -1 is private and takes none. The compactor removes superseded records after HistoryAge or beyond HistoryBytes, and
// tombstones after TombstoneAge, never the last record of a partition; offsets survive, and gaps may differ.
//
// With Fsync, and above 2 MiB/s, badger's write-ahead log gets its blocks a little ahead of its use, chunk by chunk, so
// that a sync overwrites instead of waiting for the filesystem's journal. It is an aid only: no room, a filesystem that
// copies on write, a kernel before 5.14, and all goes as without.
//
// # Damage and full disks
//
// Badger drops the rest of a write-ahead log after one flipped bit and says nothing, takes a cut MANIFEST for a whole
// one, and ends the process over some broken tables. So Open reads all of its files first (check.go), and compares them
// with the watermark: a file of 64 bytes that names what was acknowledged last, written with each append. The watermark
// names a change of the MANIFEST only a second later; until then a lost end of it shows in a table that nothing makes up
// for (manifest.go). What a kill or a power cut leaves opens with all of it. Anything less makes Open return a
// DamagedError, which names the file and the ways out: nothing is changed, because for a lone voter starting empty would
// be silent loss. Options.Quarantine, for a node whose peers have it all, moves the damaged parts aside within the
// directory and starts as a new node. Damaged files that hold nothing of ours (value log, DISCARD, KEYREGISTRY) are made
// anew.
//
// Badger writes through mmap, so a full disk is a SIGBUS. The guard asks the filesystem before every append and fails
// it below MinFree; stable writes, which raft cannot bear to fail, wait instead. What raft appends to lead at all, a few
// bytes, is taken below it, so that there is a leader to read from. While badger is at work the guard looks every 2 ms:
// when space is very low it gives up the ballast, a file of nothing, and puts up the barrier, which
// keeps badger from beginning tables. Only a table that is half written when the last byte goes is beyond it: that ends
// the process as a kill does. A database that cannot be closed for want of space is left to the next start.
//
// A snapshot from elsewhere is read to its end before anything is given up for it, and a restore that was cut short is
// finished at the next Open. A write that the database failed ends the store: what is on disk then nobody knows.
//
// A StoreLogs call that needed several transactions and failed after the first leaves a log that nobody asked for.
// Options.OnFatal is told, and from then on every write fails.
//
// # Goroutines
//
// keep (flush, watermark, memory after a load), compact, guard.watch and prealloc.run, told to end by Release and waited
// for by Close before badger closes; badger's own. Raft's main goroutine alone calls RaftLog and Stable; raft's FSM goroutine
// alone calls Append, Configuration and Restore. Everything else may be called from anywhere.
package store
