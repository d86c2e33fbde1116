// The HttpClient of the JDK with its default settings. Four threads send one request after the other, alternating GET
// and POST, until standard input ends.
//
// Each line of standard input is a number: as soon as each thread has sent that many more requests, a line with the
// numbers of answered and lost requests so far is printed. Standard error has the reason of each loss.
//
// A response of another version than VERSION counts as lost. With http:// each request offers `Upgrade: h2c`, because
// the client prefers HTTP/2; a service that declines it answers with HTTP_1_1.
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
    /** The pause of a thread between two requests, because a connection without pauses is a case of its own. */
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

    private void askRepeatedly(int thread) {
        try {
            for (boolean posts = false;; posts = !posts) {
                ask(thread, posts);
                Thread.sleep(PAUSE_MS);
            }
        } catch (InterruptedException error) {
            throw new IllegalStateException(error);
        }
    }

    /** Waits until each thread has sent so many more requests; returns the answered and the lost ones so far. */
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
        // One request first, because each thread that finds no connection opens one. Over HTTP/2 all threads share this
        // one.
        client.ask(0, true);
        for (int thread = 0; thread < THREADS; thread++) {
            int number = thread;
            Thread asking = new Thread(() -> client.askRepeatedly(number));
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
