// Package admin is the sidecar's HTTP: what a kubelet, a scraper and an operator ask.
//
// The health server (/startup /livez /readyz /metrics) only reads and may listen anywhere. The admin server (/status,
// /members and /debug/pprof) is for loopback only, and answers only requests whose Host header is a loopback name too, so
// that a web page cannot reach it through a name of its own.
//
// Health never makes an outage: /readyz follows the client listeners, never the upstream, which is shown as a check that
// does not decide. /livez fails only when the process no longer answers itself.
//
// The room asks functions that it is handed and holds no state besides. Goroutines: serve (one a server, ended by Close)
// and net/http's own, at most [MaxConnections] a server; one alive check at a time.
package admin
