package admin

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"
)

// Limits of each server.
const (
	MaxConnections  = 128              // open at a time; more wait in the kernel's queue
	maxHeaderBytes  = 16 << 10         // of a request
	headerTimeout   = 5 * time.Second  // to send one
	aliveTimeout    = 2 * time.Second  // for the process to answer itself
	idleTimeout     = 60 * time.Second // of a kept-alive connection
	shutdownTimeout = time.Second      // for answers under way when closed
)

// Check is one line of a health answer.
type Check struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Decides: the status code follows it. Other checks are there to be read.
	Decides bool   `json:"decides"`
	Detail  string `json:"detail,omitempty"`
}

// Probe is what the servers ask. All functions may be called at any time from any goroutine.
type Probe struct {
	// Started lists what has to be there once: valid configuration, bound listeners.
	Started func() []Check
	// Ready lists what a client needs, and what an operator wants to know beside.
	Ready func() []Check
	// Alive returns when the process has answered itself. It may block if it is wedged.
	Alive func() error
	// Status gives the value shown at /status.
	Status func() any
	// Members gives the value shown at /members.
	Members func() any
	// Metrics answers a scraper.
	Metrics http.Handler
}

// Server serves health and admin pages until closed.
type Server struct {
	probe  Probe
	logger *slog.Logger
	health *http.Server
	admin  *http.Server
	alive  chan struct{} // holds a token while an alive check runs
}

// Serve begins to serve health on one listener and the admin pages on the other; either may be nil.
func Serve(health, admin net.Listener, probe Probe, logger *slog.Logger) *Server {
	s := &Server{probe: probe, logger: logger, alive: make(chan struct{}, 1)}
	if health != nil {
		s.health = newServer(s.healthPages())
		go s.serve(s.health, health)
	}
	if admin != nil {
		s.admin = newServer(onlyLoopback(s.adminPages()))
		go s.serve(s.admin, admin)
	}
	return s
}

func newServer(pages http.Handler) *http.Server {
	return &http.Server{
		Handler: pages, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), // a scanner's garbage is not ours to report
	}
}

// serve runs one server until Close.
func (s *Server) serve(server *http.Server, l net.Listener) {
	if err := server.Serve(&limited{Listener: l, free: make(chan struct{}, MaxConnections)}); !errors.Is(err, http.ErrServerClosed) {
		s.logger.Error("HTTP server ended", "addr", l.Addr().String(), "err", err)
	}
}

// Close ends both servers: answers under way get a second.
func (s *Server) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	for _, server := range []*http.Server{s.health, s.admin} {
		if server != nil && server.Shutdown(ctx) != nil {
			_ = server.Close()
		}
	}
}

func (s *Server) healthPages() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /startup", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.probe.Started()) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.probe.Ready()) })
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { answer(w, []Check{s.checkAlive()}) })
	mux.Handle("GET /metrics", s.probe.Metrics)
	return mux
}

func (s *Server) adminPages() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { write(w, http.StatusOK, s.probe.Status()) })
	mux.HandleFunc("GET /members", func(w http.ResponseWriter, _ *http.Request) { write(w, http.StatusOK, s.probe.Members()) })
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// checkAlive asks the process to answer itself. A check that never returned stays the only one.
func (s *Server) checkAlive() Check {
	check := Check{Name: "process", Decides: true}
	timeout := time.NewTimer(aliveTimeout)
	defer timeout.Stop()
	select {
	case s.alive <- struct{}{}:
	case <-timeout.C:
		check.Detail = "an earlier check has not returned"
		return check
	}
	done := make(chan error, 1)
	go func() {
		done <- s.probe.Alive()
		<-s.alive
	}()
	select {
	case err := <-done:
		if check.OK = err == nil; !check.OK {
			check.Detail = err.Error()
		}
	case <-timeout.C:
		check.Detail = "no answer within " + aliveTimeout.String()
	}
	return check
}

// answer writes the checks: 200 when all that decide are well, else 503.
func answer(w http.ResponseWriter, checks []Check) {
	status, code := "ok", http.StatusOK
	for _, c := range checks {
		if c.Decides && !c.OK {
			status, code = "failing", http.StatusServiceUnavailable
		}
	}
	write(w, code, struct {
		Status string  `json:"status"`
		Checks []Check `json:"checks"`
	}{status, checks})
}

func write(w http.ResponseWriter, code int, value any) {
	body, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n'))
}

// onlyLoopback refuses requests made for another host name: DNS rebinding would turn any web page into a local client.
func onlyLoopback(pages http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if ip := net.ParseIP(strings.Trim(host, "[]")); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			http.Error(w, "the admin pages answer only for a loopback host name", http.StatusForbidden)
			return
		}
		pages.ServeHTTP(w, r)
	})
}
