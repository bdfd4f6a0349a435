package proxy

import (
	"net"

	"golang.org/x/sys/unix"
)

// control runs a function on a TCP connection's descriptor, and nothing on any other connection (a test's pipe). The
// error means that we have closed the connection ourselves.
func control(conn net.Conn, f func(fd int)) error {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}

// ended says whether the other side has closed a connection on which nothing is expected: there is then an end or an
// error to read, or bytes that belong to no request. It never waits.
func ended(conn net.Conn) bool {
	gone := false
	err := control(conn, func(fd int) {
		var b [1]byte
		_, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		gone = err != unix.EAGAIN && err != unix.EINTR
	})
	return err != nil || gone
}

// hungUp says whether the other side has closed a connection, or its half of it, even if there is something to read
// before the end. It never waits.
func hungUp(conn net.Conn) bool {
	gone := false
	err := control(conn, func(fd int) {
		polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(polled, 0)
		gone = err == nil && n > 0
	})
	return err != nil || gone
}

// unpaced keeps the kernel from pacing a connection within this host. Where the default is BBR, it would send loopback
// at its estimate of a path that has none, a timer per segment: a third of the proxy's time. Elsewhere the choice is
// the system's.
func unpaced(conn net.Conn) {
	if remote, ok := conn.RemoteAddr().(*net.TCPAddr); !ok || !remote.IP.IsLoopback() {
		return
	}
	// Reno is in every kernel, and free to all. Without it the connection works as well.
	_ = control(conn, func(fd int) { _ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno") })
}
