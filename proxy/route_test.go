package proxy

import (
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

func TestUnknownKeysPassToTheirOwnBroker(t *testing.T) {
	if r := routeOf(9999); r.action != pass || !r.bound || r.hidden {
		t.Errorf("%+v", r)
	}
}

func TestRewrittenRoutesAreThoseThatCanBeRewritten(t *testing.T) {
	for key, r := range routes {
		_, known := wire.MaxRewritten(key)
		if wanted := r.action == rewrite || key == keyFindCoordinator; wanted != known {
			t.Errorf("api key %d: rewritten %v, known to wire %v", key, wanted, known)
		}
		if _, ours := own[key]; ours != (r.action == coordinate || r.action == local) {
			t.Errorf("api key %d: action %d, own version table %v", key, r.action, ours)
		}
	}
}

func TestOnlyItsOwnBrokerAnswersWhatIsBound(t *testing.T) {
	configs := func(kind kmsg.ConfigResourceType, name string) *kmsg.DescribeConfigsRequest {
		req := kmsg.NewPtrDescribeConfigsRequest()
		r := kmsg.NewDescribeConfigsRequestResource()
		r.ResourceType, r.ResourceName = kind, name
		req.Resources = append(req.Resources, r)
		return req
	}
	alter := func(kind kmsg.ConfigResourceType, name string) *kmsg.IncrementalAlterConfigsRequest {
		req := kmsg.NewPtrIncrementalAlterConfigsRequest()
		r := kmsg.NewIncrementalAlterConfigsRequestResource()
		r.ResourceType, r.ResourceName = kind, name
		req.Resources = append(req.Resources, r)
		return req
	}
	transactional := kmsg.NewPtrInitProducerIDRequest()
	transactional.TransactionalID = kmsg.StringPtr("tx")
	for _, c := range []struct {
		what  string
		req   kmsg.Request
		bound bool
	}{
		{"Produce", kmsg.NewPtrProduceRequest(), true},
		{"Fetch", kmsg.NewPtrFetchRequest(), true},
		{"ListOffsets", kmsg.NewPtrListOffsetsRequest(), true},
		{"EndTxn", kmsg.NewPtrEndTxnRequest(), true},
		{"DescribeLogDirs", kmsg.NewPtrDescribeLogDirsRequest(), true},
		{"Metadata", kmsg.NewPtrMetadataRequest(), false},
		{"DescribeCluster", kmsg.NewPtrDescribeClusterRequest(), false},
		{"CreateTopics", kmsg.NewPtrCreateTopicsRequest(), false},
		{"FindCoordinator", kmsg.NewPtrFindCoordinatorRequest(), false},
		{"PushTelemetry", kmsg.NewPtrPushTelemetryRequest(), false},
		{"InitProducerId of a transaction", transactional, true},
		{"InitProducerId without one", kmsg.NewPtrInitProducerIDRequest(), false},
		{"a topic's configuration", configs(kmsg.ConfigResourceTypeTopic, "t"), false},
		{"a broker's configuration", configs(kmsg.ConfigResourceTypeBroker, "1"), true},
		{"all brokers' configuration", configs(kmsg.ConfigResourceTypeBroker, ""), false},
		{"a broker's loggers", configs(kmsg.ConfigResourceTypeBrokerLogger, "1"), true},
		{"changing a topic's configuration", alter(kmsg.ConfigResourceTypeTopic, "t"), false},
		{"changing a broker's configuration", alter(kmsg.ConfigResourceTypeBroker, "1"), true},
	} {
		h, frame := frameOf(t, c.req, c.req.MaxVersion())
		if got := isBound(h, frame); got != c.bound {
			t.Errorf("%s: bound %v", c.what, got)
		}
	}
	if h, frame := frameOf(t, transactional, 4); !isBound(h, frame[:h.Length]) {
		t.Error("what cannot be read is for its own broker to judge")
	}
}
