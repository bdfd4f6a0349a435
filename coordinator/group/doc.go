// Package group is the rules of consumer groups and their offsets: who is a member, which generation holds, what a
// commit may do, when an offset expires. It is the pure core of the coordinator. It is told the time, new ids and what
// is known of topics; it never asks, sends, writes or waits.
//
// # Two state machines
//
// The hard one is a table: the newest value of each record's key, as bytes. [State.Apply] changes it, one key at a
// time, and nothing else does: live, in replay and in undo the same line runs, so the table is a function of the
// newest record per key, in whatever order the keys come. [State.Record] gives a value back byte for byte.
//
// The soft one runs on top of it, for each group with members, while this sidecar is active: Kafka's ClassicGroup.
// [State.Step] takes a request, moves the machine, applies the records that come of it at once and returns them with
// the replies that may be sent when the records are replicated. [State.Tick] does the same for time that has passed.
// [State.Activate] builds the machines from the table, [State.Deactivate] drops them.
//
//	          first join
//	Empty ───────────────────► PreparingRebalance ◄──────────────────────┐
//	  ▲                         │     │     ▲                            │
//	  │ nobody is left:         │     │     │ a member is new or has     │ the same, or the
//	  │ + group, - round        │     │     │ changed; or one has gone:  │ leader joins again
//	  └─────────────────────────┘     │     │ + departed                 │
//	                      all joined, │     │                            │
//	              or time is up:      │     │                            │
//	              + round             ▼     │                            │
//	                           CompletingRebalance ─────────────────► Stable
//	                                            the leader's sync:
//	                                            + group
//
// + and - are the records of a transition and their tombstones (docs/formats.md): "group" is Kafka's GroupMetadata,
// "round" ours, the join round that was completed last, "departed" who has left since. A group is Stable if its group
// record has members and is as new as its round, CompletingRebalance if the round is newer, else Empty.
// PreparingRebalance is not kept: joins are sent again after a failover. Heartbeats, parked joins and syncs, member ids
// that were handed out and not used yet, and all deadlines are soft, too.
//
// Dead, Kafka's fifth state, is a group that is not there.
//
// # What a request waits for
//
// A reply waits until every record that was stepped before it is replicated. One that says something of the state and
// has appended nothing waits for a read fence as well ([Reply]).
//
// # Requests that are sent again
//
// A client connection is a session, its requests have ordinals. A request that yields records adds the session's record
// to them, JoinGroup and SyncGroup excepted: what they are sent for is safe to repeat. One whose ordinal is noted is not
// executed but answered as its success; what a part of it was refused for is looked at again. One that is not noted, but
// a newer one of its session is, had been refused: they come in their order. It is not executed either, for that would
// undo what is newer, and is answered COORDINATOR_NOT_AVAILABLE.
//
// # Undo
//
// Each record comes with what its key held before. An activation that ends applies those in reverse, for all that was
// stepped and not replicated, and drops the soft state; what is left is the state before.
//
// Behaviour is Kafka 4.3's, in its order of checks; comments name the class. Where we differ on purpose the comment
// begins "Unlike Kafka:", and docs/differences.md has the reasons.
package group
