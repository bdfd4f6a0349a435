package wire_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"reflect"
	"strings"
	"testing"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

// messages has one of each kind.
var messages = []struct {
	wire.PeerMessage
	hex string
}{
	{wire.PeerMessage{Kind: wire.PeerBegin, Process: [16]byte{0xaa}, Number: 2},
		"0000001d" + "01" + "00000000" + "aa000000000000000000000000000000" + "0000000000000002"},
	{wire.PeerMessage{Kind: wire.PeerOpen, Stream: 7, Term: 3, Session: [16]byte{0xbb}, Number: 4, Host: "/h", Principal: "p", Listener: -1},
		"00000030" + "02" + "00000007" + "0000000000000003" + "bb000000000000000000000000000000" + "0000000000000004" + "00022f68" + "000170" + "ffffffff"},
	{wire.PeerMessage{Kind: wire.PeerRequest, Stream: 7, Ordinal: 5, Deadline: 6, Trace: []byte("t"), Frame: []byte("frame")},
		"00000018" + "03" + "00000007" + "0000000000000005" + "00000006" + "0174" + "6672616d65"},
	{wire.PeerMessage{Kind: wire.PeerClose, Stream: 7}, "00000005" + "04" + "00000007"},
	{wire.PeerMessage{Kind: wire.PeerResponse, Stream: 7, Ordinal: 5, Term: 8, Frame: []byte("frame")},
		"0000001b" + "05" + "00000007" + "0000000000000005" + "00" + "0000000000000008" + "6672616d65"},
	{wire.PeerMessage{Kind: wire.PeerResponse, Stream: 7, Ordinal: 5, Code: wire.PeerRefused, Term: 8, Error: -1, Frame: []byte("no")},
		"0000001a" + "05" + "00000007" + "0000000000000005" + "02" + "0000000000000008" + "ffff" + "6e6f"},
	{wire.PeerMessage{Kind: wire.PeerPing}, "00000005" + "06" + "00000000"},
	{wire.PeerMessage{Kind: wire.PeerPong}, "00000005" + "07" + "00000000"},
}

// The bytes are those of docs/formats.md.
func TestPeerMessagesHaveTheirFormat(t *testing.T) {
	for _, m := range messages {
		got := wire.AppendPeer([]byte{1}, &m.PeerMessage)
		if hex.EncodeToString(got[1:]) != m.hex {
			t.Errorf("kind %d:\n%x\n%s", m.Kind, got[1:], m.hex)
		}
		read, err := wire.ParsePeer(got[5:])
		if err != nil {
			t.Fatal(err)
		}
		if len(read.Trace) == 0 {
			read.Trace = nil
		}
		if !reflect.DeepEqual(read, m.PeerMessage) {
			t.Errorf("%+v is read as %+v", m.PeerMessage, read)
		}
	}
}

func TestPeerMessagesAreReadWhole(t *testing.T) {
	for _, m := range messages {
		whole := wire.AppendPeer(nil, &m.PeerMessage)[4:]
		for n := range len(whole) - len(m.Frame) {
			if _, err := wire.ParsePeer(whole[:n]); err == nil {
				t.Errorf("%d bytes of kind %d will do", n, m.Kind)
			}
		}
		_, err := wire.ParsePeer(append(whole, 0))
		if takesMore := m.Kind == wire.PeerRequest || m.Kind == wire.PeerResponse; takesMore != (err == nil) {
			t.Errorf("kind %d with a byte more: %v", m.Kind, err)
		}
	}
	if m, err := wire.ParsePeer([]byte{200, 0, 0, 0, 9, 1, 2, 3}); err != nil || m.Kind != 200 || m.Stream != 9 {
		t.Errorf("a kind that is not known: %+v, %v", m, err)
	}
}

func TestPeerStringsAreCut(t *testing.T) {
	m := wire.PeerMessage{Kind: wire.PeerOpen, Stream: 1, Host: strings.Repeat("h", 70_000)}
	read, err := wire.ParsePeer(wire.AppendPeer(nil, &m)[4:])
	if err != nil || len(read.Host) != 65_535 {
		t.Errorf("%d bytes, %v", len(read.Host), err)
	}
}

func FuzzParsePeer(f *testing.F) {
	for _, m := range messages {
		f.Add(wire.AppendPeer(nil, &m.PeerMessage)[4:])
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		m, err := wire.ParsePeer(message)
		if err != nil || m.Kind < wire.PeerBegin || m.Kind > wire.PeerPong {
			return
		}
		again := wire.AppendPeer(nil, &m)
		if int(binary.BigEndian.Uint32(again)) != len(message) || !bytes.Equal(again[4:], message) {
			t.Fatalf("%+v\n%x\n%x", m, message, again[4:])
		}
	})
}
