package main

import (
	"context"
	"os"
	"testing"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/content"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/remotes/docker"
)

// TestPull pulls IMAGE into the namespace "pulled" of CONTAINERD_ADDRESS as nerdctl and Kubernetes do, unpacking on the way, and fails if more
// than the manifest and the configuration was downloaded.
func TestPull(t *testing.T) {
	client, err := containerd.New(os.Getenv("CONTAINERD_ADDRESS"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(context.Background(), "pulled")
	resolver := docker.NewResolver(docker.ResolverOptions{PlainHTTP: true})
	options := []containerd.RemoteOpt{containerd.WithResolver(resolver), containerd.WithPullUnpack, containerd.WithPullSnapshotter("thinpool")}
	if _, err := client.Pull(ctx, os.Getenv("IMAGE"), options...); err != nil {
		t.Fatal(err)
	}
	var downloaded []string
	if err := client.ContentStore().Walk(ctx, func(info content.Info) error {
		downloaded = append(downloaded, info.Digest.String())
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(downloaded) != 2 {
		t.Fatalf("downloaded: %v", downloaded)
	}
}
