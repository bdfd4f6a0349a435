// Package replicate makes records durable, puts them in one order, and keeps them the same on several sidecars. A record
// is a partition, a key and a value, nothing more: what they mean is the coordinator's.
//
// # The flow
//
//	Entries ─► append ─► raft.Apply ─► raft's log (one fsync) ─► fsm ─► tail of the compacted log
//	                        └► settle ─► Failed                   └───► Events: Applied, Ignored
//	                                            lead ───────────────► Events: Active, Inactive
//	                       transport ─► insync ─────────────────────► Events: Stored
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
// Applied means committed by raft: a majority of the voters has it on disk (Config.Fsync). A kill at any moment loses
// nothing applied. Stored means that every in-sync replica has it as well (insync.go); with AcksQuorum, or alone, an
// Applied is Stored. Failed means that nobody knows: the entry may still come as Applied, before the next Active.
// Latest, at Reset, gives the state that everything after builds on.
//
// A Fence (fence.go) is complete once a majority of the voters has answered requests whose sending began after it did;
// raft's own VerifyLeader counts answers to older ones, and those of non-voters.
//
// # The cluster
//
//	gossip.go     who is there, and where (serf)
//	peer.go       one port for raft, forwarded requests and status; hello.go and secure.go keep strangers out
//	membership.go what this node is: a voter or standby with a replica (replica.go), or a forwarder without
//	birth.go      who founds the cluster
//	roles.go      the leader's choice of voters and standbys (raft-autopilot)
//	transport.go  round raft's own: match index of each replica, fences, elections by closed connection
//	handover.go   leadership is handed to another; entries wait meanwhile
//	status.go     who is active, told at once over streams that stay open
//
// Raft's id and address of a node are both its UUID, kept in the store; it is looked up through gossip when it is
// dialled, so a node may come back with any address. A store without raft's state is always a new node.
//
// # Goroutines
//
// Of a Node: followGossip, followConfiguration, keepTags, and those of gossip, peer port and status streams. Of a replica:
// lead (leadership, resignation), append (takes entries), settle (waits for raft's answers, in order), acknowledge (what
// the in-sync replicas have stored), trim (size of raft's log), relay (the transport), and on the leader reconcileRoles;
// store's keep and compact, raft's, serf's and badger's own. Close ends them all; so does a fatal error: an entry that
// cannot be decoded, a store that cannot go on.
package replicate
