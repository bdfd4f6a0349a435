package proxy

import (
	"context"
	"sync"
	"time"
)

const probeInterval = 500 * time.Millisecond

// health remembers which upstream addresses are suspected to be down. A suspect is not asked what others can answer; it
// is probed until it answers again, so that clients do not have to find out.
type health struct {
	mu       sync.Mutex
	suspects map[string]struct{}
}

func (h *health) suspected(addr string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, yes := h.suspects[addr]
	return yes
}

func (h *health) clear(addr string) {
	h.mu.Lock()
	delete(h.suspects, addr)
	h.mu.Unlock()
}

// suspect notes that an address refused, reset or did not answer, and begins to probe it.
func (p *Proxy) suspect(addr string, why error) {
	if addr == "" || p.ctx.Err() != nil {
		return
	}
	p.health.mu.Lock()
	_, known := p.health.suspects[addr]
	if !known {
		if p.health.suspects == nil {
			p.health.suspects = map[string]struct{}{}
		}
		p.health.suspects[addr] = struct{}{}
		p.running.Add(1)
	}
	p.health.mu.Unlock()
	if known {
		return
	}
	p.logger.Warn("upstream broker does not answer; what any broker can answer goes to others", "upstream", addr, "err", why)
	p.upstream.Nudge()
	go p.probe(addr)
}

// probe asks a suspect for its versions until it answers, or nobody would go there any more.
func (p *Proxy) probe(addr string) {
	defer p.running.Done()
	defer p.health.clear(addr)
	for {
		ctx, cancel := context.WithTimeout(p.ctx, dialTimeout)
		conn, versions, err := p.connect(ctx, addr)
		cancel()
		if err == nil {
			_ = conn.Close()
			p.table.learnVersions(addr, versions)
			p.logger.Info("upstream broker answers again", "upstream", addr)
			p.upstream.Nudge()
			return
		}
		if !p.table.wanted(addr) {
			return
		}
		p.upstream.Nudge() // until its answer leaves the broker out: FindCoordinator must agree with Metadata
		select {
		case <-time.After(probeInterval):
		case <-p.ctx.Done():
			return
		}
	}
}
