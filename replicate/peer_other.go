//go:build !linux

package replicate

import "net"

// tune has nothing to do here.
func tune(net.Conn) {}
