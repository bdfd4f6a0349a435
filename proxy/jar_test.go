//go:build e2e

package proxy

// These tests hold our tables against Kafka's own message definitions, the JSON files in the kafka-clients jar. They
// are what fails first when a new Kafka brings a key, a version or an address that nobody here has looked at.

import (
	"archive/zip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

// message is one of Kafka's message definitions.
type message struct {
	Key      *int16         `json:"apiKey"`
	Type     string         `json:"type"`
	Name     string         `json:"name"`
	Valid    string         `json:"validVersions"`
	Flexible string         `json:"flexibleVersions"`
	Unstable bool           `json:"latestVersionUnstable"`
	Fields   []messageField `json:"fields"`
	Structs  []messageField `json:"commonStructs"`
}

type messageField struct {
	Name     string         `json:"name"`
	Type     string         `json:"type"`
	Versions string         `json:"versions"`
	Nullable string         `json:"nullableVersions"`
	Tag      *int           `json:"tag"`
	Fields   []messageField `json:"fields"`
}

// versionRange reads "3-9", "4+", "0" and "none".
func versionRange(t *testing.T, text string) versions {
	t.Helper()
	if text == "none" || text == "" {
		return versions{0, -1}
	}
	number := func(s string) int16 {
		n, err := strconv.ParseInt(s, 10, 16)
		if err != nil {
			t.Fatalf("versions %q: %v", text, err)
		}
		return int16(n)
	}
	if low, ok := strings.CutSuffix(text, "+"); ok {
		return versions{number(low), 1<<15 - 1}
	}
	if low, high, ok := strings.Cut(text, "-"); ok {
		return versions{number(low), number(high)}
	}
	return versions{number(text), number(text)}
}

// valid gives the versions that a broker shows by default.
func (m *message) valid(t *testing.T) versions {
	v := versionRange(t, m.Valid)
	if m.Unstable {
		v.max--
	}
	return v
}

var comment = regexp.MustCompile(`(?m)^\s*//.*$|\s//[^"\n]*$`)

// kafkaMessages reads the definitions from the jar.
func kafkaMessages(t *testing.T) []message {
	t.Helper()
	jar := os.Getenv("KAFKA_CLIENTS_JAR")
	if jar == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		jar = filepath.Join(cache, "offset-sidecar-e2e", "kafka-4.3.0", "kafka-clients-4.3.0.jar")
	}
	archive, err := zip.OpenReader(jar)
	if err != nil {
		t.Fatalf("%v\nThis test needs kafka-clients-4.3.0.jar (Maven Central, org.apache.kafka:kafka-clients:4.3.0, fetched by e2e/setup): put its path into KAFKA_CLIENTS_JAR.", err)
	}
	defer archive.Close()
	var all []message
	for _, file := range archive.File {
		if !strings.HasPrefix(file.Name, "common/message/") || !strings.HasSuffix(file.Name, ".json") {
			continue
		}
		in, err := file.Open()
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(in)
		in.Close()
		if err != nil {
			t.Fatal(err)
		}
		var m message
		if err := json.Unmarshal(comment.ReplaceAll(text, nil), &m); err != nil {
			t.Fatalf("%s: %v", file.Name, err)
		}
		all = append(all, m)
	}
	if len(all) < 150 {
		t.Fatalf("%s has only %d message definitions", jar, len(all))
	}
	return all
}

func TestJarEveryKeyOfKafkaHasARoute(t *testing.T) {
	for _, m := range kafkaMessages(t) {
		if m.Type != "request" {
			continue
		}
		r, known := routes[*m.Key]
		if !known || r.reason == "" {
			t.Errorf("%s (%d) has no route, or one without a reason", m.Name, *m.Key)
		}
	}
}

func TestJarOurVersionsAreThoseOfKafka(t *testing.T) {
	for _, m := range kafkaMessages(t) {
		if m.Type != "request" {
			continue
		}
		key, valid := *m.Key, m.valid(t)
		if ours, ok := own[key]; ok && key != keyApiVersions && ours != valid {
			t.Errorf("%s: we serve %v, Kafka %v", m.Name, ours, valid)
		}
		if newest, ok := wire.MaxRewritten(key); ok && newest < valid.max {
			t.Errorf("%s: we can rewrite up to version %d, Kafka has %d", m.Name, newest, valid.max)
		}
		if v, ok := assumed[key]; ok && (v.min < valid.min || v.max > valid.max) {
			t.Errorf("%s: assumed %v, Kafka has %v", m.Name, v, valid)
		}
	}
}

// looksLikeAddress matches names of fields that tell where something can be reached. It is wide on purpose.
var looksLikeAddress = regexp.MustCompile(`(?i)host|(^|[a-z])port$|endpoint|listener|address`)

// rewritten has the fields whose addresses wire.RewriteResponse replaces; "" is the response itself.
var rewritten = map[string]bool{
	"ProduceResponse/NodeEndpoints":        true,
	"MetadataResponse/Brokers":             true,
	"FindCoordinatorResponse":              true,
	"FindCoordinatorResponse/Coordinators": true,
	"DescribeClusterResponse/Brokers":      true,
	"ProduceResponse":                      true, // has NodeEndpoints
	"DescribeClusterResponse/EndpointType": true,
}

// notAddresses has the fields that are not to be rewritten, and why.
var notAddresses = map[string]string{
	"DescribeGroupsResponse/Groups/Members":                  "where a member connects from; we make it",
	"DescribeAclsResponse/Resources/Acls":                    "the host that an ACL is for",
	"DeleteAclsResponse/FilterResults/MatchingAcls":          "the host that an ACL is for",
	"DescribeQuorumResponse/Nodes":                           "controllers' listeners, which clients do not connect to",
	"DescribeQuorumResponse/Nodes/Listeners":                 "controllers' listeners, which clients do not connect to",
	"DescribeClusterResponse":                                "EndpointType says whether brokers or controllers are named",
	"ConsumerGroupDescribeResponse/Groups/Members":           "where a member connects from",
	"StreamsGroupDescribeResponse/Groups/Members":            "an application's own endpoint",
	"StreamsGroupDescribeResponse/Endpoint":                  "an application's own endpoint",
	"StreamsGroupHeartbeatResponse/PartitionsByUserEndpoint": "an application's own endpoint",
	"StreamsGroupHeartbeatResponse/Endpoint":                 "an application's own endpoint",
	"StreamsGroupHeartbeatResponse":                          "counts and lists applications' own endpoints",
	"ShareGroupDescribeResponse/Groups/Members":              "where a member connects from",
}

func TestJarNoAddressInAResponseIsForgotten(t *testing.T) {
	for _, m := range kafkaMessages(t) {
		if m.Type != "response" {
			continue
		}
		r := routeOf(*m.Key)
		var walk func(path string, fields []messageField)
		walk = func(path string, fields []messageField) {
			for _, f := range fields {
				walk(path+"/"+f.Name, f.Fields)
				if !looksLikeAddress.MatchString(f.Name) || strings.Contains(f.Name, "Supported") {
					continue
				}
				since := versionRange(t, f.Versions).min
				switch {
				case rewritten[path]:
					if _, ok := wire.MaxRewritten(*m.Key); !ok {
						t.Errorf("%s: %s is said to be rewritten, and is not", path, f.Name)
					}
				case notAddresses[path] != "":
				case *m.Key == keyFetch && since > maxFetch:
				case r.action == refuse:
				case r.hidden: // only controllers' listeners answer these, or brokers ask them of one another
				default:
					t.Errorf("%s names %s from version %d on: is it a broker's address? Rewrite it, or say in notAddresses why not", path, f.Name, since)
				}
			}
		}
		walk(m.Name, m.Fields)
		for _, s := range m.Structs {
			walk(m.Name+"/"+s.Name, s.Fields)
		}
	}
}

// body builds request bodies from a message definition, and counts the places where a null can be written.
type body struct {
	t        *testing.T
	m        *message
	version  int16
	flexible bool
	nullAt   int // which place gets the null; -1 for none
	places   int
	allowed  bool // a null is allowed there
	out      []byte
}

func (b *body) length(n int, wide bool) {
	switch {
	case b.flexible:
		b.out = binary.AppendUvarint(b.out, uint64(n+1))
	case wide:
		b.out = binary.BigEndian.AppendUint32(b.out, uint32(n))
	default:
		b.out = binary.BigEndian.AppendUint16(b.out, uint16(n))
	}
}

// null writes a null if this is the place for it.
func (b *body) null(f messageField, wide bool) bool {
	b.places++
	if b.places-1 != b.nullAt {
		return false
	}
	b.allowed = versionRange(b.t, f.Nullable).has(b.version)
	b.length(-1, wide)
	return true
}

func (b *body) fields(fields []messageField) {
	for _, f := range fields {
		if !versionRange(b.t, f.Versions).has(b.version) {
			continue
		}
		if f.Tag != nil {
			b.t.Fatalf("%s: tagged field %s", b.m.Name, f.Name)
		}
		element, isArray := strings.CutPrefix(f.Type, "[]")
		if !isArray {
			b.field(f, f.Type)
			continue
		}
		if b.null(f, true) {
			continue
		}
		b.length(2, true)
		for range 2 {
			b.field(messageField{Name: f.Name, Fields: f.Fields}, element)
		}
	}
	if b.flexible {
		b.out = append(b.out, 1, 99, 2, 'o', 'k') // an unknown tag
	}
}

func (b *body) field(f messageField, kind string) {
	sizes := map[string]int{"bool": 1, "int8": 1, "int16": 2, "uint16": 2, "int32": 4, "int64": 8, "uuid": 16}
	switch size, fixed := sizes[kind]; {
	case fixed:
		b.out = append(b.out, make([]byte, size)...)
	case kind == "string" || kind == "bytes":
		if wide := kind == "bytes"; !b.null(f, wide) {
			b.length(3, wide)
			b.out = append(b.out, "abc"...)
		}
	default:
		b.fields(f.Fields)
	}
}

// lookedInto are the requests that are not for us to answer, ApiVersions apart, and are decoded all the same.
var lookedInto = map[int16]bool{
	2: true, 3: true, keyApiVersions: true, 19: true, 20: true, 21: true, 22: true, 25: true, 28: true, 32: true, 33: true, 37: true, 43: true, 44: true,
	45: true, 46: true, 57: true, 60: true, 68: true, 69: true, 76: true, 77: true, 80: true, 89: true, 90: true,
}

// What we take from clients is read as Kafka reads it: every version whole, and with a null in each place that can
// hold one; cut short anywhere it is an error.
func TestJarGroupRequestsAreReadAsKafkaReadsThem(t *testing.T) {
	checked := 0
	for _, m := range kafkaMessages(t) {
		if m.Type != "request" {
			continue
		}
		key := *m.Key
		read, ours := own[key]
		if !ours || key == keyApiVersions { // of which we know more than this jar
			if !lookedInto[key] {
				continue
			}
			read = m.valid(t)
		}
		checked++
		for version := read.min; version <= min(read.max, kmsg.RequestForKey(key).MaxVersion()); version++ {
			build := func(nullAt int) *body {
				b := &body{t: t, m: &m, version: version, flexible: versionRange(t, m.Flexible).has(version), nullAt: nullAt}
				b.fields(m.Fields)
				return b
			}
			decode := func(body []byte) error {
				frame := binary.BigEndian.AppendUint16(nil, uint16(key))
				frame = binary.BigEndian.AppendUint16(frame, uint16(version))
				frame = append(frame, 0, 0, 0, 7, 0xff, 0xff)
				if versionRange(t, m.Flexible).has(version) {
					frame = append(frame, 0)
				}
				h, err := wire.ParseRequestHeader(frame)
				if err != nil || h.Length != len(frame) {
					t.Fatalf("%s version %d: header %+v, %v", m.Name, version, h, err)
				}
				_, err = wire.DecodeRequest(h, append(frame, body...))
				return err
			}
			whole := build(-1)
			if err := decode(whole.out); err != nil {
				t.Errorf("%s version %d: %v", m.Name, version, err)
			}
			for cut := range whole.out {
				if decode(whole.out[:cut]) == nil {
					t.Errorf("%s version %d: read from %d bytes of %d", m.Name, version, cut, len(whole.out))
				}
			}
			for place := range whole.places {
				b := build(place)
				if err := decode(b.out); (err == nil) != b.allowed {
					t.Errorf("%s version %d, null in place %d, allowed %v: %v", m.Name, version, place, b.allowed, err)
				}
			}
		}
	}
	if want := len(own) - 1 + len(lookedInto); checked != 0 && checked != want {
		t.Errorf("%d requests checked, of %d", checked, want)
	}
}

// kmsg must know what Kafka knows, or a request of a version that we advertise could not be decoded.
func TestJarLibraryKnowsOurVersions(t *testing.T) {
	var unknown []string
	for key, v := range own {
		if req := kmsg.RequestForKey(key); req.MaxVersion() < v.max {
			unknown = append(unknown, fmt.Sprintf("%s %d", kmsg.NameForKey(key), v.max))
		}
	}
	slices.Sort(unknown)
	if len(unknown) > 0 {
		t.Error(unknown)
	}
}
