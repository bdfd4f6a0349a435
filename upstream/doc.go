// Package upstream is the sidecar's own client of the Kafka cluster behind it: which brokers there are, and which
// topics. Clients' data does not pass through here.
//
// One goroutine, [Client.Run], asks for the brokers every 30 s, after errors and when nudged; one that it starts asks
// for topics when the coordinator needs them. Both end with Run's context. What was learnt stays when the upstream
// goes: [Client.Brokers] gives the last list that was not empty, [Client.Topic] the last answer for that topic.
//
// The upstream may be down, may never have been up, may speak something other than Kafka: none of it is an error to
// the caller. It is logged once when it begins and once when it ends, and asked again with growing pauses.
//
// What it promises about the upstream: a topic is never created by asking for it, and topics are only asked for when
// somebody here needs them.
package upstream
