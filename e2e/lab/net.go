package lab

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// Network is a switch with network namespaces behind it: between them packets can be dropped, while the machine itself
// reaches all of them. It needs root.
type Network struct {
	Nets []*Net

	bridge string
}

// Net is one of them: a machine of its own, as far as the network goes.
type Net struct {
	Host string

	name, wire string
}

// NewNetwork makes a network of n namespaces.
func NewNetwork(n int) (*Network, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("network namespaces need root: run the tests as root")
	}
	if err := installed("ip", "nft"); err != nil {
		return nil, err
	}
	id := os.Getpid() % 100_000
	subnet := fmt.Sprintf("10.213.%d", id%250)
	w := &Network{bridge: fmt.Sprintf("osb%d", id)}
	steps := []string{
		"ip link add " + w.bridge + " type bridge",
		fmt.Sprintf("ip addr add %s.254/24 dev %s", subnet, w.bridge),
		"ip link set " + w.bridge + " up",
	}
	for i := range n {
		net := &Net{Host: fmt.Sprintf("%s.%d", subnet, i+1), name: fmt.Sprintf("os%d-%d", id, i), wire: fmt.Sprintf("osv%d-%d", id, i)}
		w.Nets = append(w.Nets, net)
		steps = append(steps,
			"ip netns add "+net.name,
			fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s", net.wire, net.name),
			fmt.Sprintf("ip link set %s master %s up", net.wire, w.bridge),
			fmt.Sprintf("ip -n %s addr add %s/24 dev eth0", net.name, net.Host),
			fmt.Sprintf("ip -n %s link set eth0 up", net.name),
			fmt.Sprintf("ip -n %s link set lo up", net.name),
			fmt.Sprintf("ip netns exec %s nft add table inet cut", net.name),
			fmt.Sprintf("ip netns exec %s nft add chain inet cut in { type filter hook input priority 0 ; }", net.name),
		)
	}
	for _, step := range steps {
		if err := command(step); err != nil {
			w.Remove()
			return nil, err
		}
	}
	return w, nil
}

func command(line string) error {
	args := strings.Fields(line)
	_, err := Run(10*time.Second, nil, args[0], args[1:]...)
	return err
}

// Drop lets no packet from one namespace reach another; the other direction goes on.
func (w *Network) Drop(from, to *Net) error {
	return command(fmt.Sprintf("ip netns exec %s nft add rule inet cut in ip saddr %s drop", to.name, from.Host))
}

// Cut parts some namespaces from all others, in both directions.
func (w *Network) Cut(some ...*Net) error {
	for _, a := range some {
		for _, b := range w.Nets {
			if slices.Contains(some, b) {
				continue
			}
			if err := w.Drop(a, b); err != nil {
				return err
			}
			if err := w.Drop(b, a); err != nil {
				return err
			}
		}
	}
	return nil
}

// Heal lets everything through again.
func (w *Network) Heal() error {
	for _, net := range w.Nets {
		if err := command("ip netns exec " + net.name + " nft flush chain inet cut in"); err != nil {
			return err
		}
	}
	return nil
}

// Remove takes it all down; what runs in it must have ended.
func (w *Network) Remove() {
	for _, net := range w.Nets {
		_ = command("ip netns del " + net.name) // with its end of the wire
		_ = command("ip link del " + net.wire)
	}
	_ = command("ip link del " + w.bridge)
}
