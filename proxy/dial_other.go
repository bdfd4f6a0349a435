//go:build !linux

package proxy

import "net"

// ended cannot tell here; a leg that the broker has closed is then noticed when its reply is missing.
func ended(net.Conn) bool { return false }
