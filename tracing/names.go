package tracing

// Series is a metric that has no labels of its own; see the table below for its name.
type Series uint8

// The series, each with who moves it.
const (
	SplicedBytes          Series = iota // proxy: bytes of replies moved by splice, never in our memory
	CopiedBytes                         // proxy: bytes of requests and replies moved through our memory
	Splices                             // proxy: replies moved by splice
	Connections                         // proxy: client connections accepted
	ConnectionsOpen                     // proxy: client connections now
	ConnectionsRefused                  // proxy: client connections closed because of --max-connections
	RequestsInFlight                    // proxy: requests read and not yet answered
	UpstreamConnections                 // proxy: connections to the upstream now
	UpstreamDials                       // proxy: dials of the upstream
	UpstreamDialsFailed                 // proxy: those that failed
	BrokerListeners                     // proxy: listeners bound for upstream brokers
	ResentRequests                      // proxy: group requests submitted again after the coordinator was inactive
	Active                              // coordinator: 1 while it answers
	Activations                         // coordinator: terms in which it became active
	Term                                // coordinator: the term of the newest activation
	Groups                              // coordinator: groups in the state
	Members                             // coordinator: members of all groups
	Offsets                             // coordinator: committed offsets in the state
	ParkedReplies                       // coordinator: replies that wait for something
	Steps                               // coordinator: requests executed
	Commits                             // coordinator: offsets committed, one for each partition
	CommitRequests                      // coordinator: OffsetCommit requests executed
	OffsetFetches                       // coordinator: OffsetFetch requests executed
	Rebalances                          // coordinator: generations begun
	Fences                              // coordinator: read fences
	CommitTimeouts                      // coordinator: replies that missed --commit-timeout
	RaftAppends                         // replicate: entries appended
	RaftAppendsFailed                   // replicate: entries that could not be appended
	RaftAppendRecords                   // replicate: records in them
	RaftAppendBytes                     // replicate: bytes of them
	RaftAppendNanos                     // replicate: time from handing an entry to raft to its Apply, shown in seconds
	Flushes                             // replicate: batches written to the compacted log
	FlushedRecords                      // replicate: records in them
	StoreBytes                          // replicate: size of the data directory's files
	FreeBytes                           // replicate: free space of its file system
	UpstreamBrokers                     // upstream: brokers in the newest answer
	UpstreamRefreshes                   // upstream: Metadata requests of our own
	UpstreamRefreshErrors               // upstream: those that failed
	seriesCount
)

type kind uint8

const (
	counter kind = iota
	gauge
	nanos // a counter of nanoseconds, shown in seconds
)

// series names each Series exactly as a scraper sees it.
var series = [seriesCount]struct {
	name string
	kind kind
	help string
}{
	SplicedBytes:          {"offset_sidecar_spliced_bytes_total", counter, "Bytes of upstream replies moved to clients by splice."},
	CopiedBytes:           {"offset_sidecar_copied_bytes_total", counter, "Bytes relayed between clients and the upstream through the sidecar's memory."},
	Splices:               {"offset_sidecar_splices_total", counter, "Upstream replies moved by splice."},
	Connections:           {"offset_sidecar_connections_total", counter, "Client connections accepted."},
	ConnectionsOpen:       {"offset_sidecar_connections", gauge, "Client connections open now."},
	ConnectionsRefused:    {"offset_sidecar_connections_refused_total", counter, "Client connections closed because --max-connections was reached."},
	RequestsInFlight:      {"offset_sidecar_requests_in_flight", gauge, "Requests read and not yet answered."},
	UpstreamConnections:   {"offset_sidecar_upstream_connections", gauge, "Connections to upstream brokers open now."},
	UpstreamDials:         {"offset_sidecar_upstream_dials_total", counter, "Connections to upstream brokers tried."},
	UpstreamDialsFailed:   {"offset_sidecar_upstream_dials_failed_total", counter, "Connections to upstream brokers that could not be made."},
	BrokerListeners:       {"offset_sidecar_broker_listeners", gauge, "Listeners bound for upstream brokers."},
	ResentRequests:        {"offset_sidecar_resent_requests_total", counter, "Group requests submitted again because the coordinator was inactive."},
	Active:                {"offset_sidecar_active", gauge, "1 while this sidecar's coordinator answers."},
	Activations:           {"offset_sidecar_activations_total", counter, "Times the coordinator became active."},
	Term:                  {"offset_sidecar_term", gauge, "Raft term of the newest activation."},
	Groups:                {"offset_sidecar_groups", gauge, "Groups kept."},
	Members:               {"offset_sidecar_members", gauge, "Members of all groups."},
	Offsets:               {"offset_sidecar_offsets", gauge, "Committed offsets kept."},
	ParkedReplies:         {"offset_sidecar_parked_replies", gauge, "Group replies that wait for something."},
	Steps:                 {"offset_sidecar_group_requests_total", counter, "Group and offset requests executed."},
	Commits:               {"offset_sidecar_commits_total", counter, "Offsets committed, one for each partition."},
	CommitRequests:        {"offset_sidecar_commit_requests_total", counter, "OffsetCommit requests executed."},
	OffsetFetches:         {"offset_sidecar_offset_fetches_total", counter, "OffsetFetch requests executed."},
	Rebalances:            {"offset_sidecar_rebalances_total", counter, "Generations begun."},
	Fences:                {"offset_sidecar_fences_total", counter, "Read fences made."},
	CommitTimeouts:        {"offset_sidecar_commit_timeouts_total", counter, "Requests not replicated within --commit-timeout."},
	RaftAppends:           {"offset_sidecar_raft_appends_total", counter, "Entries appended to the replicated log."},
	RaftAppendsFailed:     {"offset_sidecar_raft_appends_failed_total", counter, "Entries that could not be appended."},
	RaftAppendRecords:     {"offset_sidecar_raft_append_records_total", counter, "Records in appended entries."},
	RaftAppendBytes:       {"offset_sidecar_raft_append_bytes_total", counter, "Bytes of appended entries."},
	RaftAppendNanos:       {"offset_sidecar_raft_append_seconds_total", nanos, "Time from handing an entry to raft to its application, summed."},
	Flushes:               {"offset_sidecar_flushes_total", counter, "Batches written to the compacted log."},
	FlushedRecords:        {"offset_sidecar_flushed_records_total", counter, "Records written to the compacted log."},
	StoreBytes:            {"offset_sidecar_store_bytes", gauge, "Size of the data directory's files."},
	FreeBytes:             {"offset_sidecar_free_bytes", gauge, "Free space of the data directory's file system."},
	UpstreamBrokers:       {"offset_sidecar_upstream_brokers", gauge, "Upstream brokers in the newest answer."},
	UpstreamRefreshes:     {"offset_sidecar_upstream_refreshes_total", counter, "Metadata requests of the sidecar's own."},
	UpstreamRefreshErrors: {"offset_sidecar_upstream_refresh_errors_total", counter, "Metadata requests of the sidecar's own that failed."},
}

// Metrics with one label, and the labels.
const (
	nameRequests = "offset_sidecar_requests_total"
	helpRequests = "Requests read from clients, by api."
	labelAPI     = "api"

	nameErrors = "offset_sidecar_errors_total"
	helpErrors = "Group responses with a Kafka error, by error."
	labelError = "error"

	nameMistakes = "offset_sidecar_client_mistakes_total"
	helpMistakes = "Client connections closed for what was sent on them, by mistake."
	labelMistake = "mistake"

	nameBuild    = "offset_sidecar_build_info"
	helpBuild    = "1, with the version as a label."
	labelVersion = "version"
)

// Mistake is why a client's connection was closed: something only that client did.
type Mistake uint8

// The mistakes.
const (
	MistakeTLS        Mistake = iota // TLS on a plain port
	MistakeHTTP                      // HTTP on a Kafka port
	MistakeFrameSize                 // a frame with a negative length or over the limit
	MistakeHeader                    // a frame too short or too odd for a request header
	MistakeRequest                   // a request that does not decode
	MistakeUpstream                  // the upstream's answer could not be read or placed
	MistakeSlowReader                // replies not taken in time
	mistakeCount
)

var mistakes = [mistakeCount]string{"tls", "http", "frame_size", "header", "request", "upstream_reply", "slow_reader"}
