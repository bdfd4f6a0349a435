//go:build !linux

package proxy

import "net"

// ended cannot tell here; a leg that the broker has closed is then noticed when its reply is missing.
func ended(net.Conn) bool { return false }

// hungUp cannot tell here either; a client that has gone is then noticed when it is written to.
func hungUp(net.Conn) bool { return false }

// unpaced has nothing to do here.
func unpaced(net.Conn) {}
