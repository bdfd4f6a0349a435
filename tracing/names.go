package tracing

// Series is a metric that has no labels of its own; see the table below for its name.
type Series uint8

// The series, each with who moves it.
const (
	SplicedBytes        Series = iota // proxy: bytes of replies moved by splice, never in our memory
	CopiedBytes                       // proxy: bytes of requests and replies moved through our memory
	Splices                           // proxy: replies moved by splice
	Connections                       // proxy: client connections accepted
	ConnectionsOpen                   // proxy: client connections now
	ConnectionsRefused                // proxy: client connections closed because of --max-connections
	RequestsInFlight                  // proxy: requests read and not yet answered
	UpstreamConnections               // proxy: connections to the upstream now
	UpstreamDials                     // proxy: dials of the upstream
	UpstreamDialsFailed               // proxy: those that failed
	BrokerListeners                   // proxy: listeners bound for upstream brokers
	ResentRequests                    // proxy: group requests submitted again after the coordinator was inactive
	ForwardedRequests                 // proxy: group requests sent to the active sidecar, each time they are
	ForwardLinks                      // proxy: connections to the active sidecar now
	PeerRequests                      // proxy: group requests that peers have sent us
	ForwardPeers                      // proxy: connections by which peers do so now
	ForwardMistakes                   // proxy: those closed for what was sent on them
	Active                            // coordinator: 1 while it answers
	Activations                       // coordinator: terms in which it became active
	Term                              // coordinator: the term of the newest activation
	ParkedReplies                     // coordinator: replies that wait for something
	Steps                             // coordinator: requests executed
	Fences                            // coordinator: read fences
	Commits                           // coordinator: offsets committed, one for each partition
	Rebalances                        // coordinator: generations begun
	RaftAppends                       // coordinator: entries replicated
	RaftAppendRecords                 // coordinator: records in them
	CommitTimeouts                    // coordinator: replies that missed --commit-timeout
	UpstreamBrokers                   // the program: brokers in the upstream's newest answer
	PeerConnections                   // replicate: incoming connections of peers now
	PeerDials                         // replicate: connections to peers tried
	PeerDialsFailed                   // replicate: those that could not be made, or were refused
	seriesCount
)

type kind uint8

const (
	counter kind = iota
	gauge
)

// series names each Series exactly as a scraper sees it.
var series = [seriesCount]struct {
	name string
	kind kind
	help string
}{
	SplicedBytes:        {"offset_sidecar_spliced_bytes_total", counter, "Bytes of upstream replies moved to clients by splice."},
	CopiedBytes:         {"offset_sidecar_copied_bytes_total", counter, "Bytes relayed between clients and the upstream through the sidecar's memory."},
	Splices:             {"offset_sidecar_splices_total", counter, "Upstream replies moved by splice."},
	Connections:         {"offset_sidecar_connections_total", counter, "Client connections accepted."},
	ConnectionsOpen:     {"offset_sidecar_connections", gauge, "Client connections open now."},
	ConnectionsRefused:  {"offset_sidecar_connections_refused_total", counter, "Client connections closed because --max-connections was reached."},
	RequestsInFlight:    {"offset_sidecar_requests_in_flight", gauge, "Requests read and not yet answered."},
	UpstreamConnections: {"offset_sidecar_upstream_connections", gauge, "Connections to upstream brokers open now."},
	UpstreamDials:       {"offset_sidecar_upstream_dials_total", counter, "Connections to upstream brokers tried."},
	UpstreamDialsFailed: {"offset_sidecar_upstream_dials_failed_total", counter, "Connections to upstream brokers that could not be made."},
	BrokerListeners:     {"offset_sidecar_broker_listeners", gauge, "Listeners bound for upstream brokers."},
	ResentRequests:      {"offset_sidecar_resent_requests_total", counter, "Group requests submitted again because the coordinator was inactive."},
	ForwardedRequests:   {"offset_sidecar_forwarded_requests_total", counter, "Group requests sent to the active sidecar."},
	ForwardLinks:        {"offset_sidecar_forward_links", gauge, "Connections to the active sidecar for group requests open now."},
	PeerRequests:        {"offset_sidecar_peer_requests_total", counter, "Group requests that other sidecars have sent to this one."},
	ForwardPeers:        {"offset_sidecar_forward_peers", gauge, "Connections by which other sidecars send group requests open now."},
	ForwardMistakes:     {"offset_sidecar_forward_mistakes_total", counter, "Connections of other sidecars closed for what was sent on them."},
	Active:              {"offset_sidecar_active", gauge, "1 while this sidecar's coordinator answers."},
	Activations:         {"offset_sidecar_activations_total", counter, "Times the coordinator became active."},
	Term:                {"offset_sidecar_term", gauge, "Raft term of the newest activation."},
	ParkedReplies:       {"offset_sidecar_parked_replies", gauge, "Group replies that wait for something."},
	Steps:               {"offset_sidecar_group_requests_total", counter, "Group and offset requests executed."},
	Fences:              {"offset_sidecar_fences_total", counter, "Read fences made."},
	Commits:             {"offset_sidecar_commits_total", counter, "Offsets committed, one for each partition."},
	Rebalances:          {"offset_sidecar_rebalances_total", counter, "Generations begun."},
	RaftAppends:         {"offset_sidecar_raft_appends_total", counter, "Entries replicated."},
	RaftAppendRecords:   {"offset_sidecar_raft_append_records_total", counter, "Records in replicated entries."},
	CommitTimeouts:      {"offset_sidecar_commit_timeouts_total", counter, "Requests not replicated within --commit-timeout."},
	UpstreamBrokers:     {"offset_sidecar_upstream_brokers", gauge, "Upstream brokers in the newest answer."},
	PeerConnections:     {"offset_sidecar_peer_connections", gauge, "Incoming connections of other sidecars open now."},
	PeerDials:           {"offset_sidecar_peer_dials_total", counter, "Connections to other sidecars tried."},
	PeerDialsFailed:     {"offset_sidecar_peer_dials_failed_total", counter, "Connections to other sidecars that could not be made or were refused."},
}

// Metrics with one label, and the labels.
const (
	nameRequests = "offset_sidecar_requests_total"
	helpRequests = "Requests read from clients, by api."
	labelAPI     = "api"

	nameErrors = "offset_sidecar_errors_total"
	helpErrors = "Kafka errors in group replies, by error."
	labelError = "error"

	nameMistakes = "offset_sidecar_client_mistakes_total"
	helpMistakes = "Client connections closed for what was sent on them, by mistake."
	labelMistake = "mistake"

	nameStrangers = "offset_sidecar_peers_refused_total"
	helpStrangers = "Connections to the peer port closed before anything was exchanged, and gossip refused, by reason."
	labelReason   = "reason"

	nameBuild    = "offset_sidecar_build_info"
	helpBuild    = "1, with the version as a label."
	labelVersion = "version"
)

// Mistake is why a client's connection was closed: something only that client did.
type Mistake uint8

// The mistakes.
const (
	MistakeTLS       Mistake = iota // TLS on a plain port
	MistakeHTTP                     // HTTP on a Kafka port
	MistakeFrameSize                // a frame with a negative length or over the limit
	MistakeHeader                   // a frame too short or too odd for a request header
	MistakeRequest                  // a request that does not decode
	MistakeUpstream                 // the upstream's answer could not be read or placed
	mistakeCount
)

var mistakes = [mistakeCount]string{"tls", "http", "frame_size", "header", "request", "upstream_reply"}

// Stranger is why a connection to the peer port was closed before anything was exchanged, or gossip was refused.
type Stranger uint8

// The reasons.
const (
	StrangerAddress     Stranger = iota // not of this machine, and nothing secures the port
	StrangerTLS                         // no TLS, or no certificate of a node of this cluster
	StrangerToken                       // does not know the join token
	StrangerSilent                      // closed or silent before its hello was complete
	StrangerGarbage                     // something else than a hello
	StrangerCluster                     // a sidecar of another cluster
	StrangerClusterID                   // of a cluster with the same name that was founded apart
	StrangerVersion                     // speaks no version that we do
	StrangerNode                        // looks for another node
	StrangerKind                        // wants what nothing here takes
	StrangerConnections                 // there are too many
	StrangerGossip                      // at the gossip port: without the key, or of another cluster
	strangerCount
)

var strangers = [strangerCount]string{"address", "tls", "token", "silent", "garbage", "cluster", "cluster_id", "version", "node", "kind", "connections", "gossip"}
