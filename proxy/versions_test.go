package proxy

import (
	"encoding/hex"
	"slices"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

// kafka43 is what Kafka 4.3.0 answers to ApiVersions 4, all features at their newest level.
func kafka43() *kmsg.ApiVersionsResponse {
	resp := kmsg.NewPtrApiVersionsResponse()
	resp.Version = 4
	kversion.V4_3_0().EachMaxKeyVersion(func(key, newest int16) {
		k := kmsg.NewApiVersionsResponseApiKey()
		k.ApiKey, k.MaxVersion = key, newest
		switch key {
		case 1:
			k.MinVersion = 4
		case 8:
			k.MinVersion = 2
		}
		resp.ApiKeys = append(resp.ApiKeys, k)
	})
	for _, f := range []struct {
		name     string
		min, max int16
	}{
		{"eligible.leader.replicas.version", 0, 1}, {"group.version", 0, 1}, {"kraft.version", 0, 1},
		{"metadata.version", 7, 29}, {"share.version", 0, 1}, {"streams.version", 0, 1}, {"transaction.version", 0, 2},
	} {
		s := kmsg.NewApiVersionsResponseSupportedFeature()
		s.Name, s.MinVersion, s.MaxVersion = f.name, f.min, f.max
		resp.SupportedFeatures = append(resp.SupportedFeatures, s)
		l := kmsg.NewApiVersionsResponseFinalizedFeature()
		l.Name, l.MinVersionLevel, l.MaxVersionLevel = f.name, f.max, f.max
		resp.FinalizedFeatures = append(resp.FinalizedFeatures, l)
	}
	resp.FinalizedFeaturesEpoch = 42
	return resp
}

func kafka28() *kmsg.ApiVersionsResponse {
	resp := kmsg.NewPtrApiVersionsResponse()
	kversion.V2_8_0().EachMaxKeyVersion(func(key, newest int16) {
		k := kmsg.NewApiVersionsResponseApiKey()
		k.ApiKey, k.MaxVersion = key, newest
		resp.ApiKeys = append(resp.ApiKeys, k)
	})
	return resp
}

func frameOf(t *testing.T, req kmsg.Request, version int16) (wire.RequestHeader, []byte) {
	t.Helper()
	req.SetVersion(version)
	frame := kmsg.NewRequestFormatter(kmsg.FormatterClientID("client")).AppendRequest(nil, req, 7)[4:]
	h, err := wire.ParseRequestHeader(frame)
	if err != nil {
		t.Fatal(err)
	}
	return h, frame
}

// asked is the answer to a well-behaved client that asks in that version.
func asked(t *testing.T, version int16, k known) *kmsg.ApiVersionsResponse {
	t.Helper()
	req := kmsg.NewPtrApiVersionsRequest()
	req.ClientSoftwareName, req.ClientSoftwareVersion = "apache-kafka-java", "4.3.0"
	h, frame := frameOf(t, req, version)
	resp, err := apiVersions(h, frame, k)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func rangeOf(resp *kmsg.ApiVersionsResponse, key int16) (versions, bool) {
	for _, k := range resp.ApiKeys {
		if k.ApiKey == key {
			return versions{k.MinVersion, k.MaxVersion}, true
		}
	}
	return versions{}, false
}

func TestClientsSeeWhatIsServed(t *testing.T) {
	for _, c := range []struct {
		what string
		k    known
		want map[int16]versions // {0, -1}: not shown
	}{
		{"Kafka 4.3 behind", known{upstream: kafka43(), topicIDs: true, nodeID: -1}, map[int16]versions{
			0: {0, 13}, 1: {4, 15}, 2: {0, 11}, 3: {0, 13}, 8: {2, 10}, 9: {1, 10}, 10: {0, 6}, 11: {0, 9}, 12: {0, 4},
			13: {0, 5}, 14: {0, 5}, 15: {0, 6}, 16: {0, 5}, 18: {0, 5}, 42: {0, 2}, 47: {0, 0}, 60: {0, 2}, 75: {0, 0},
			68: {0, -1}, 69: {0, -1}, 76: {0, -1}, 77: {0, -1}, 78: {0, -1}, 79: {0, -1}, 83: {0, -1}, 84: {0, -1},
			85: {0, -1}, 86: {0, -1}, 87: {0, -1}, 88: {0, -1}, 89: {0, -1}, 90: {0, -1}, 91: {0, -1}, 92: {0, -1},
			25: {0, 4}, 28: {0, 5}, 71: {0, 0},
		}},
		{"Kafka 2.8 behind", known{upstream: kafka28(), topicIDs: true, nodeID: 1}, map[int16]versions{
			0: {0, 9}, 1: {0, 12}, 3: {0, 11}, 8: {2, 10}, 9: {1, 10}, 11: {0, 9}, 13: {0, 5}, 15: {0, 6}, 16: {0, 5},
			42: {0, 2}, 47: {0, 0}, 4: {0, -1}, 5: {0, -1}, 6: {0, -1}, 7: {0, -1}, 56: {0, -1},
			10: {0, 3}, // what is not about a group goes upstream as it is
		}},
		{"a broker without topic ids somewhere", known{upstream: kafka43()}, map[int16]versions{8: {2, 9}, 9: {1, 9}}},
		{"an upstream that was never reached", known{}, map[int16]versions{
			0: {0, 9}, 1: {4, 12}, 3: {0, 11}, 8: {2, 9}, 9: {1, 9}, 10: {0, 6}, 11: {0, 9}, 18: {0, 5},
		}},
	} {
		resp := asked(t, 4, c.k)
		for key, want := range c.want {
			got, shown := rangeOf(resp, key)
			if shown != (want.max >= 0) || shown && got != want {
				t.Errorf("%s: api key %d is shown as %v (%v), want %v", c.what, key, got, shown, want)
			}
		}
		if !slices.IsSortedFunc(resp.ApiKeys, func(a, b kmsg.ApiVersionsResponseApiKey) int { return int(a.ApiKey) - int(b.ApiKey) }) {
			t.Errorf("%s: keys are not in order", c.what)
		}
	}
}

func TestKeysToComePassAndAKeyWeCannotRewriteIsHidden(t *testing.T) {
	upstream := kafka43()
	for key, v := range map[int16]versions{9999: {2, 3}, 3: {14, 15}} {
		k := kmsg.NewApiVersionsResponseApiKey()
		k.ApiKey, k.MinVersion, k.MaxVersion = key, v.min, v.max
		upstream.ApiKeys = slices.DeleteFunc(upstream.ApiKeys, func(k kmsg.ApiVersionsResponseApiKey) bool { return k.ApiKey == key })
		upstream.ApiKeys = append(upstream.ApiKeys, k)
	}
	resp := asked(t, 4, known{upstream: upstream})
	if v, shown := rangeOf(resp, 9999); !shown || v != (versions{2, 3}) {
		t.Errorf("api key 9999 is shown as %v (%v)", v, shown)
	}
	if v, shown := rangeOf(resp, 3); shown {
		t.Errorf("Metadata is shown as %v, which we cannot rewrite", v)
	}
}

// Every version that is shown must be one that the proxy lets pass.
func TestWhatIsShownIsServed(t *testing.T) {
	for _, k := range []known{{upstream: kafka43(), topicIDs: true}, {upstream: kafka28()}, {}} {
		for _, a := range asked(t, 4, k).ApiKeys {
			for v := a.MinVersion; v <= a.MaxVersion; v++ {
				if !served(a.ApiKey, v) {
					t.Errorf("api key %d, version %d is shown and not served", a.ApiKey, v)
				}
			}
		}
	}
}

// oracle: wire-unsupported-versions.
func TestVersionsThatKafkaClosesTheConnectionForAreNotServed(t *testing.T) {
	for _, c := range []struct{ key, version int16 }{
		{11, 10}, {14, 6}, {12, 5}, {13, 6}, {8, 0}, {8, 1}, {8, 11}, {9, 0}, {9, 11}, {10, 7}, {15, 7}, {16, 6}, {42, 3}, {47, 1},
		{3, 14}, {0, 14}, {60, 3}, {1, 16},
	} {
		if served(c.key, c.version) {
			t.Errorf("api key %d, version %d is served", c.key, c.version)
		}
	}
	for _, c := range []struct{ key, version int16 }{{18, 99}, {9999, 99}, {2, 99}, {1, 15}} {
		if !served(c.key, c.version) {
			t.Errorf("api key %d, version %d is not served", c.key, c.version)
		}
	}
}

func TestAssumedVersionsAreThoseOfKafka28AndNewer(t *testing.T) {
	old, newest := kversion.V2_8_0(), kversion.V4_3_0()
	for key, v := range assumed {
		a, ok1 := old.LookupMaxKeyVersion(key)
		b, ok2 := newest.LookupMaxKeyVersion(key)
		if !ok1 || !ok2 || v.max != min(a, b) {
			t.Errorf("api key %d: assumed %v, Kafka 2.8 has %d, 4.3 %d", key, v, a, b)
		}
	}
}

func TestFeaturesThatAreNotServedAreHidden(t *testing.T) {
	for version, want := range map[int16][]string{
		2: nil,
		3: {"metadata.version"}, // minimum 0 breaks older Java clients (KAFKA-17011)
		4: {"eligible.leader.replicas.version", "kraft.version", "metadata.version", "transaction.version"},
	} {
		resp := asked(t, version, known{upstream: kafka43()})
		var got []string
		for _, f := range resp.SupportedFeatures {
			got = append(got, f.Name)
			if f.Name == "transaction.version" && f.MaxVersion != 1 {
				t.Errorf("transaction.version up to %d is supported", f.MaxVersion)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("version %d: supported features %q, want %q", version, got, want)
		}
		for _, f := range resp.FinalizedFeatures {
			switch f.Name {
			case "group.version", "share.version", "streams.version":
				t.Errorf("version %d: finalized feature %s", version, f.Name)
			case "transaction.version":
				if f.MaxVersionLevel != 1 || f.MinVersionLevel != 1 {
					t.Errorf("version %d: transaction.version at %d", version, f.MaxVersionLevel)
				}
			}
		}
		if version >= 3 && resp.FinalizedFeaturesEpoch != 42 {
			t.Errorf("version %d: epoch %d", version, resp.FinalizedFeaturesEpoch)
		}
	}
	if shared := kafka43(); shared.SupportedFeatures[6].MaxVersion != 2 {
		t.Fatal("the fixture is wrong")
	}
}

func TestUpstreamsAnswerIsNotChanged(t *testing.T) {
	upstream := kafka43()
	before := upstream.AppendTo(nil)
	for version := range int16(6) {
		asked(t, version, known{upstream: upstream})
	}
	if string(upstream.AppendTo(nil)) != string(before) {
		t.Error("the cached answer was changed")
	}
}

// KIP-511. The bytes are what Kafka 4.3 answers, but for our one version more.
func TestUnknownApiVersionsVersionIsAnsweredInVersion0(t *testing.T) {
	for _, version := range []string{"0063", "ffff"} { // 99, -1
		frame, _ := hex.DecodeString("0012" + version + "00000007" + "ffff" + "00")
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := apiVersions(h, []byte("not to be read"), known{upstream: kafka43()})
		if err != nil {
			t.Fatal(err)
		}
		got := hex.EncodeToString(wire.AppendResponse(nil, 7, resp))
		if want := "00000010" + "00000007" + "0023" + "00000001" + "0012" + "0000" + "0005"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestClientsNamesAreCheckedAsKafkaDoes(t *testing.T) {
	for name, valid := range map[string]bool{
		"apache-kafka-java": true, "x": true, "1": true, "a.b": true, "": false, "-x": false, "x-": false, "x y": false,
		"ü": false, "x\n": false, ".": false, "a_b": false,
	} {
		for _, of := range []string{"name", "version"} {
			req := kmsg.NewPtrApiVersionsRequest()
			req.ClientSoftwareName, req.ClientSoftwareVersion = "x", "1"
			if of == "name" {
				req.ClientSoftwareName = name
			} else {
				req.ClientSoftwareVersion = name
			}
			h, frame := frameOf(t, req, 3)
			resp, err := apiVersions(h, frame, known{})
			if err != nil || (resp.ErrorCode == 0) != valid || !valid && (resp.ErrorCode != 42 || len(resp.ApiKeys) > 0) {
				t.Errorf("%s %q: error code %d, %v", of, name, resp.ErrorCode, err)
			}
		}
	}
	if resp := asked(t, 2, known{}); resp.ErrorCode != 0 {
		t.Error("version 2 has no names to check")
	}
}

// KIP-1242.
func TestMisroutedConnectionsAreFound(t *testing.T) {
	here := known{clusterID: "here", nodeID: 2}
	for _, c := range []struct {
		what    string
		cluster *string
		node    int32
		k       known
		code    int16
	}{
		{"a client that bootstraps", nil, -1, here, 0},
		{"the right node", kmsg.StringPtr("here"), 2, here, 0},
		{"another cluster", kmsg.StringPtr("there"), 2, here, 129},
		{"another node", kmsg.StringPtr("here"), 3, here, 129},
		{"a node without a cluster", nil, 2, here, 42},
		{"a cluster without a node", kmsg.StringPtr("here"), -1, here, 42},
		{"any node on the bootstrap listener", kmsg.StringPtr("here"), 3, known{clusterID: "here", nodeID: -1}, 0},
		{"a cluster not yet known", kmsg.StringPtr("here"), 2, known{nodeID: 2}, 0},
	} {
		req := kmsg.NewPtrApiVersionsRequest()
		req.ClientSoftwareName, req.ClientSoftwareVersion, req.ClusterID, req.NodeID = "x", "1", c.cluster, c.node
		h, frame := frameOf(t, req, 5)
		resp, err := apiVersions(h, frame, c.k)
		if err != nil || resp.ErrorCode != c.code || resp.Version != 5 {
			t.Errorf("%s: error code %d, %v, want %d", c.what, resp.ErrorCode, err, c.code)
		}
	}
}

func TestBrokenApiVersionsIsAnError(t *testing.T) {
	for _, body := range []string{"", "\x00\x00\x00", "\x05ab"} {
		frame := []byte("\x00\x12\x00\x03\x00\x00\x00\x07\xff\xff\x00" + body)
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := apiVersions(h, frame, known{}); err == nil {
			t.Errorf("%q was answered with %+v", body, resp)
		}
	}
}
