// The JDK's HttpClient in its default settings: four threads, each one request after the other, a GET and then a POST.
// They stop when standard input ends.
//
// A line on standard input is answered with a line as soon as each thread has had so many more requests: the requests
// answered and the requests lost until then. Why one was lost is on standard error.
//
// An answer of another version than VERSION counts as lost. With http:// each request offers `Upgrade: h2c`, as the
// client prefers HTTP/2, and a service that declines it answers with HTTP_1_1.
//
// usage: java JavaClient.java URL VERSION [CHAIN]
//        java JavaClient.java https://127.0.0.1:8443/ HTTP_2 tls.crt
//        java JavaClient.java http://127.0.0.1:8080/ HTTP_1_1

import java.io.BufferedReader;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManagerFactory;

public class JavaClient {
    private static final int THREADS = 4;
    /** Between two requests of a thread, because a connection with no pause between requests is a case of its own. */
    private static final long PAUSE_MS = 2;

    private final HttpClient client;
    private final URI root;
    private final HttpClient.Version version;
    private final long[] done = new long[THREADS];
    private long answered;
    private long lost;

    private JavaClient(String[] arguments) throws Exception {
        root = URI.create(arguments[0]);
        version = HttpClient.Version.valueOf(arguments[1]);
        HttpClient.Builder builder = HttpClient.newBuilder();
        if (arguments.length > 2) {
            builder.sslContext(trusting(arguments[2]));
        }
        client = builder.build();
    }

    private static SSLContext trusting(String chain) throws Exception {
        KeyStore roots = KeyStore.getInstance(KeyStore.getDefaultType());
        roots.load(null, null);
        try (FileInputStream file = new FileInputStream(chain)) {
            roots.setCertificateEntry("root", CertificateFactory.getInstance("X.509").generateCertificate(file));
        }
        TrustManagerFactory trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(roots);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(null, trust.getTrustManagers(), null);
        return context;
    }

    private void ask(int thread, boolean posts) throws InterruptedException {
        String body = "x".repeat(900);
        HttpRequest get = HttpRequest.newBuilder(root).build();
        HttpRequest post =
            HttpRequest.newBuilder(root.resolve("/echo")).POST(BodyPublishers.ofString(body)).build();
        String failure = null;
        try {
            HttpResponse<String> response = client.send(posts ? post : get, BodyHandlers.ofString());
            boolean isWhole = response.statusCode() == 200 && (!posts || response.body().equals(body));
            if (!isWhole || response.version() != version) {
                failure = response + " " + response.version() + ": " + response.body();
            }
        } catch (IOException error) {
            failure = error.toString();
        }
        if (failure != null) {
            System.err.println(System.currentTimeMillis() + (posts ? " POST: " : " GET: ") + failure);
        }
        synchronized (this) {
            done[thread]++;
            if (failure == null) {
                answered++;
            } else {
                lost++;
            }
            notifyAll();
        }
    }

    private void askOn(int thread) {
        try {
            for (boolean posts = false;; posts = !posts) {
                ask(thread, posts);
                Thread.sleep(PAUSE_MS);
            }
        } catch (InterruptedException error) {
            throw new IllegalStateException(error);
        }
    }

    /** Waits until each thread has had so many requests more. */
    private synchronized String after(long more) throws InterruptedException {
        long[] wanted = done.clone();
        for (int thread = 0; thread < THREADS; thread++) {
            while (done[thread] < wanted[thread] + more) {
                wait();
            }
        }
        return answered + " " + lost;
    }

    public static void main(String[] arguments) throws Exception {
        JavaClient client = new JavaClient(arguments);
        // The first alone, because each thread that finds no connection makes one. Over HTTP/2 all share this one.
        client.ask(0, true);
        for (int thread = 0; thread < THREADS; thread++) {
            int number = thread;
            Thread asking = new Thread(() -> client.askOn(number));
            asking.setDaemon(true);
            asking.start();
        }
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            System.out.println(client.after(Long.parseLong(line)));
        }
        System.exit(0);
    }
}
