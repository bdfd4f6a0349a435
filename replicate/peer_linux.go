package replicate

import (
	"net"

	"golang.org/x/sys/unix"
)

// tune sets what net does not. A peer that does not take what is sent within unackedTimeout has its connection closed;
// keep-alive says nothing while something is unacknowledged. Within this host the kernel shall not pace: where the
// default is BBR, it would send loopback at its estimate of a path that has none, a timer per segment.
func tune(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	local := isLoopback(tcp.RemoteAddr())
	// Without any of it the connection works as well. Reno is in every kernel, and free to all.
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unackedTimeout.Milliseconds()))
		if local {
			_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
		}
	})
}
