package replicate

import (
	"context"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// Both sides of a connection within this host are spared the kernel's pacing, and give up on a peer that takes nothing.
func TestPeerConnectionsAreTuned(t *testing.T) {
	d := &directory{}
	a, b := openTestPeer(t, d, nil), openTestPeer(t, d, nil)
	conn, _, err := a.dial(context.Background(), b.id.node, peerForward)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for side, conn := range map[string]net.Conn{"dialled": conn, "accepted": b.take().conn.(*incomingConn).raw} {
		raw, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		err = raw.Control(func(fd uintptr) {
			if name, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil || name != "reno" {
				t.Errorf("%s: congestion control %q, %v", side, name, err)
			}
			if ms, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); err != nil || ms != 30_000 {
				t.Errorf("%s: user time-out %d ms, %v", side, ms, err)
			}
			if on, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY); err != nil || on == 0 {
				t.Errorf("%s: Nagle is on, %v", side, err)
			}
			if on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE); err != nil || on == 0 {
				t.Errorf("%s: no keep-alive, %v", side, err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
