// Package proxy stands between Kafka clients and the upstream brokers: it owns the listeners, the client connections and
// the order of their replies, and decides which request goes where.
//
// What it promises:
//
//   - A client needs one changed line, bootstrap.servers. There is one bootstrap listener and one for each upstream
//     broker; node ids, cluster id and everything else are the upstream's own, only addresses are replaced by ours.
//   - Whatever is not in the route table is passed on untouched, both ways.
//   - Replies leave a connection in the order of its requests, whoever answers them. Group requests are handed to the
//     coordinator when they are read, also while an older request waits for the upstream.
//   - Every listener answers ApiVersions, FindCoordinator of groups and all group requests while its broker is down, and
//     asks another broker for what any broker can answer.
//
// What it does not do: it never decodes records, retries nothing that a broker may have executed, and knows nothing of
// raft or of the store; it is handed something that keeps small values ([Store]).
//
// # A connection
//
// Two goroutines serve a connection. readRequests alone reads the client and alone writes to the legs, the connection's
// own connections to the upstream. writeReplies alone writes to the client and alone reads the legs. Between them lies
// inflight, a bounded queue of slots, one for each request that will be answered:
//
//	client ─► readRequests ─┬─► leg (the listener's broker, or any other) ─┐
//	                        ├─► session ─► coordinator ─────┐              │
//	                        └─► inflight: ▢ ▢ ▢ ▢           ▼              ▼
//	client ◄─────────────────────── writeReplies ◄── the oldest slot's answer
//
// A leg is dialled when it is first needed, in a goroutine of its own, so that nothing waits for a dead broker but what
// was meant for it. A session holds the connection's group requests while no coordinator is active and sends them again
// when there is one. Frames from 64 KiB on are moved by splice between TCP sockets; smaller ones go through one buffer,
// several in one write where they lie ready. On a connection that talks to its broker alone writeReplies does not wait to
// be told of a slot: it listens to the leg, whose reply wakes it. So it does after a Produce without acks, whose failure a
// broker tells by closing the connection: the client is closed then. A broker that closes only seconds later has found
// the leg idle; that, the client does not notice.
//
// # Peers
//
// Where the active coordinator is another sidecar's, sessions send their requests over a link to it (forward.go), one
// connection for all of them; the other end of a link is a peerConn (peers.go). Frames cross it unchanged, both ways. A
// link lasts as long as its connection and its activation, whichever ends first; whatever is unanswered then comes back
// to its session, exactly as from our own coordinator when that ceases to be active, and goes to whoever is active next
// under the same ordinal, by which the coordinator knows what it has executed. Nobody waits for a link: its queue holds
// no bytes but the frames that the clients' own slots keep, and are bounded by.
//
// At the other end nothing is submitted that may be older than something submitted already: streams of another term are
// refused, a session's newer stream ends its older one, and a sidecar's newer connection its older one, however much of
// that lies unread in a socket.
//
// # Goroutines
//
// accept (a listener) · readRequests, writeReplies (a connection) · dial (a leg, until it is up) · probe (a broker that
// is suspected to be down, until it answers) · keepListeners, resumeSessions and followActive (one each) · keepLink (an
// activation elsewhere), which reads the link; write and watch (a link) · ServePeer, which reads, and write (a peer's
// connection). All end with Shutdown.
package proxy
