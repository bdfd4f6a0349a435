// Package replicate makes records durable and puts them in one order. A record is a partition, a key and a value,
// nothing more: what they mean is the coordinator's.
//
// # The flow
//
//	Entries ─► append ─► raft.Apply ─► raft's log (one fsync) ─► fsm ─► tail of the compacted log
//	                        └► settle ─► Failed                   └───► Events: Applied, Ignored
//	                                            lead ───────────────► Events: Active, Inactive
//
// An Entry names the term it was computed in and its sequence number there, from 1. raft.Apply binds to no term, and
// with a failed leadership transfer an entry in the middle can be lost while the next is replicated; so every replica
// ignores, alike, an entry whose term is not that of its place in raft's log, or whose number is not the next. After
// the first failure in a term nothing more of that term is appended.
//
// Events come in the order of the log. The first is Reset; entries replayed at the start follow as Applied; Active
// comes after a barrier in its term, when all entries before it have been delivered, and a leadership that was lost
// and won again while nobody looked is told as Inactive(old), Active(new), whatever raft's LeaderCh dropped. The
// receiver may be slow: the log waits for it. When the channel is closed the Node has ended; Err says why. Entries is
// not read any more then, so offer an entry only in a select with Events.
//
// # What is promised
//
// Applied means committed by raft: with one voter, on its disk (Config.Fsync). A kill at any moment loses nothing
// applied. Failed means that nobody knows: the entry may still come as Applied, before the next Active. Latest, at
// Reset, gives the state that everything after builds on.
//
// # One voter
//
// This version runs a cluster of one, bootstrapped when the store is empty. Its transport decorator is the one that
// many voters will have; with a lone voter it carries nothing but TimeoutNow requests to ourselves, which make us
// leader at once instead of after an election time-out (hashicorp/raft has no other way), and begin a new term for
// Resign. A fence is complete at once: no other voter could have been elected.
//
// # Goroutines
//
// lead (leadership, resignation, size of raft's log), append (takes entries), settle (waits for raft's answers, in
// order), relay (the transport), store's keep and compact, raft's and badger's own. Close ends them all; so does a
// fatal error: an entry that cannot be decoded, a store that cannot go on.
package replicate
