package wire_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

// fixture is a frame that a real client or a real broker has sent.
type fixture struct {
	from         string
	key, version int16
	response     bool
	frame        []byte
}

func fixtures(t testing.TB) []fixture {
	t.Helper()
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	var all []fixture
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(bytes.NewReader(text))
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			words := strings.Fields(lines.Text())
			if len(words) != 4 || words[0] == "#" {
				continue
			}
			key, err1 := strconv.Atoi(words[0])
			version, err2 := strconv.Atoi(words[1])
			frame, err3 := hex.DecodeString(words[3])
			if err1 != nil || err2 != nil || err3 != nil {
				t.Fatalf("%s: bad line %.60q", file, lines.Text())
			}
			all = append(all, fixture{filepath.Base(file), int16(key), int16(version), words[2] == "response", frame})
		}
	}
	return all
}

// request gives the frame, without its size, of a request with a client id.
func request(r kmsg.Request, version int16) []byte {
	r.SetVersion(version)
	return kmsg.NewRequestFormatter(kmsg.FormatterClientID("client")).AppendRequest(nil, r, 7)[4:]
}

// response gives the frame, without its size, of a response with correlation id 7.
func response(r kmsg.Response, version int16) []byte {
	r.SetVersion(version)
	return wire.AppendResponse(nil, 7, r)[4:]
}

// decode decodes a response as a client does.
func decode(t testing.TB, key, version int16, frame []byte) kmsg.Response {
	t.Helper()
	resp := kmsg.ResponseForKey(key)
	resp.SetVersion(version)
	header := 4
	if resp.IsFlexible() && key != 18 {
		header = 5
		if frame[4] != 0 {
			t.Fatalf("tags in the header of a response of api key %d", key)
		}
	}
	if err := resp.ReadFrom(frame[header:]); err != nil {
		t.Fatalf("api key %d, version %d: %v", key, version, err)
	}
	return resp
}

func TestResponseHasAFlexibleHeaderUnlessItIsApiVersions(t *testing.T) {
	for _, c := range []struct {
		resp    kmsg.Response
		version int16
		header  string
	}{
		{kmsg.NewPtrHeartbeatResponse(), 3, "0000000a" + "00000007" + "00000000" + "0000"},
		{kmsg.NewPtrHeartbeatResponse(), 4, "0000000c" + "00000007" + "00" + "00000000" + "0000" + "00"},
		{kmsg.NewPtrApiVersionsResponse(), 3, "0000000c" + "00000007" + "0000" + "01" + "00000000" + "00"},
	} {
		c.resp.SetVersion(c.version)
		got := wire.AppendResponse([]byte{0xaa}, 7, c.resp)
		if hex.EncodeToString(got) != "aa"+c.header {
			t.Errorf("api key %d, version %d: %x, want aa%s", c.resp.Key(), c.version, got, c.header)
		}
	}
}

func TestResponseSizeIsThatOfTheFrame(t *testing.T) {
	resp := kmsg.NewPtrListGroupsResponse()
	resp.Version = 5
	for range 1000 {
		g := kmsg.NewListGroupsResponseGroup()
		g.Group = "a group"
		resp.Groups = append(resp.Groups, g)
	}
	got := wire.AppendResponse(make([]byte, 3), -1, resp)
	if n := binary.BigEndian.Uint32(got[3:]); int(n) != len(got)-7 {
		t.Errorf("size %d of a frame of %d bytes", n, len(got)-7)
	}
}

func TestOtherProtocolsAreNamed(t *testing.T) {
	for first, want := range map[string]string{
		"\x16\x03\x01\x02":   "TLS",
		"\x16\x03\x03\x00":   "TLS",
		"\x15\x03\x03\x00":   "TLS alert",
		"GET / HTTP/1.1\r\n": "HTTP GET",
		"POST":               "HTTP POST",
		"HTTP/1.1 400":       "HTTP response",
		"PRI * HTTP/2.0":     "HTTP/2",
		"SSH-2.0":            "SSH",
		"\x00\x00\x00\x20":   "",
		"\x06\x40\x00\x00":   "", // 100 MiB, the largest frame allowed
		"":                   "",
		"\x16":               "",
	} {
		if got := wire.Sniff([]byte(first)); got != want {
			t.Errorf("%q: %q, want %q", first, got, want)
		}
	}
}
