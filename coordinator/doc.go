// Package coordinator makes the pure rules of coordinator/group a running group coordinator: it owns the clock, the
// order of requests, the batching of records into entries, and the replies that wait for them to be replicated.
//
// One goroutine, [Coordinator.Run], alone touches group.State. It takes requests, what the log delivers, finished read
// fences and refreshed topics, and blocks on nothing: it offers the appender its next entry in the same select, and
// Request.Done must not block.
//
// An activation is one term of raft (activation.go). Steps apply their records at once; only replies wait, each for the
// entry that holds the last record stepped before it to be replicated, and besides: if it acknowledges records, for every
// in-sync replica to have stored them; if it asserts group state without having appended, for a read fence that began
// after the request came; for a heartbeat that found all well, one will do that began an election time-out before.
//
// An activation that ends, for whatever reason, is undone: the previous record of each key in flight is applied in
// reverse, soft state is dropped, and every unanswered request is given back with [ErrInactive], to be resent in its
// session's order to whoever is active then. Those that wait for copies alone are given back too: their records stand, and
// the next activation answers from the session's record. An activation that ends while raft still leads is never resumed
// in that term (Leadership.Resign).
//
// While there is no room on disk (Leadership.Full), nothing is executed that may yield records (group.State.MayWrite):
// such requests are refused at once with an error that clients retry, timers stand still, and the others are answered.
//
// What it does not do: sockets and frames (proxy), who is leader (replicate), what a request means (coordinator/group).
package coordinator
