package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
)

// viewTimeout is how long a running sidecar may take to answer a verb that looks at it.
const viewTimeout = 10 * time.Second

// maxViewBytes of an answer; one sidecar of a cluster takes some 400.
const maxViewBytes = 64 << 20

var outputFlag = &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "table", Usage: "`FORMAT`: table or json"}

// view asks the sidecar at --admin for a page and shows it, as it came or as write has it.
func (p *program) view(c *cli.Context, page string, into any, write func(io.Writer) error) error {
	output := c.String("output")
	if err := oneOf(output, "table", "json"); err != nil {
		return usageError{fmt.Errorf("--output %q: %w", output, err)}
	}
	config, err := p.config(c, "run")
	if err != nil {
		return err
	}
	addr := config.Admin.Admin
	if _, port, _ := net.SplitHostPort(addr); addr == "" || port == "0" {
		return usageError{fmt.Errorf("--admin must be the address that the sidecar serves its admin pages at; its log line \"ready\" names it")}
	}
	body, err := fetch("http://" + addr + page)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no sidecar answers at --admin %s: is it running, with that --admin? (%w)", addr, err)
	case err != nil:
		return fmt.Errorf("asking the sidecar at --admin %s: %w", addr, err)
	}
	if output == "json" {
		_, err := p.stdout.Write(body)
		return err
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("--admin %s does not answer as a sidecar of this version does: %w", addr, err)
	}
	return write(p.stdout)
}

func fetch(url string) ([]byte, error) {
	client := http.Client{Timeout: viewTimeout, Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxViewBytes))
	if err == nil && resp.StatusCode != http.StatusOK {
		text, _, _ := strings.Cut(string(body), "\n")
		err = fmt.Errorf("%s: %.200s", resp.Status, text)
	}
	return body, err
}

// members is the verb: who is in the cluster.
func (p *program) members(c *cli.Context) error {
	var s MembersStatus
	return p.view(c, "/members", &s, func(w io.Writer) error { return writeMembers(w, &s) })
}

// status is the verb: one sentence first, then what one looks for next.
func (p *program) status(c *cli.Context) error {
	var s Status
	return p.view(c, "/status", &s, func(w io.Writer) error { return writeStatus(w, &s) })
}
