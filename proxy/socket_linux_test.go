package proxy

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ends are the two ends of a connection over loopback.
func ends(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close() })
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	return dialled.(*net.TCPConn), accepted.(*net.TCPConn)
}

// soon waits until the kernel has carried over what the other end did.
func soon(t *testing.T, what string, now func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !now(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what, "is not seen")
		}
	}
}

func TestConnectionsWithinTheHostAreNotPaced(t *testing.T) {
	conn, _ := ends(t)
	unpaced(conn)
	var name string
	var err error
	if cerr := control(conn, func(fd int) {
		name, err = unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	if name != "reno" {
		t.Fatalf("congestion control %q, want reno", name)
	}
}

func TestAnEndIsSeenWithoutReading(t *testing.T) {
	near, far := ends(t)
	if ended(near) || hungUp(near) {
		t.Error("a connection that is open and idle counts as ended")
	}
	if _, err := far.Write([]byte("a last word")); err != nil {
		t.Fatal(err)
	}
	soon(t, "what nobody asked for", func() bool { return ended(near) })
	if hungUp(near) {
		t.Error("bytes count as an end")
	}
	if err := far.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	soon(t, "the end behind bytes", func() bool { return hungUp(near) })
	if ended(far) || hungUp(far) {
		t.Error("the half that is still open counts as ended")
	}
	near.Close()
	if !ended(near) || !hungUp(near) {
		t.Error("a connection that we have closed counts as open")
	}
}

func TestOtherConnectionsNeverSeemEnded(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	far.Close()
	unpaced(near)
	if ended(near) || hungUp(near) {
		t.Error("a pipe has no descriptor to ask")
	}
}
